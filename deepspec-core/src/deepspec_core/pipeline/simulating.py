"""`deepspec simulate`: the throughput of an evaluation's rounds under several verification policies and loads.

Knows a run's folder, cost tables and calibrations by their files. The replay is in evaluation/simulation.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, frozen

from deepspec_core.decoding.engine import Completion
from deepspec_core.digests import digest_of
from deepspec_core.errors import CheckpointError, StageError
from deepspec_core.evaluation.calibration_file import Calibration, read_calibration
from deepspec_core.evaluation.cost_table import CostTable, faster_with_more, read_cost_table
from deepspec_core.evaluation.reliability import judged
from deepspec_core.evaluation.simulation import Outcome, policies, replay, replayable
from deepspec_core.pipeline.recorded_rounds import RecordedRounds, recorded_rounds

VERSION = 1


@frozen(kw_only=True)
class Simulation:
    """The outcomes by number of requests, then policy, and what they were made from, in plain JSON types.

    `confidences` is False where the draft gives none. Policies that need them are then missing. `noise` says where
    steps of the cost table take less time with more tokens.
    """

    outcomes: tuple[Outcome, ...]
    confidences: bool
    made_from: dict[str, Any]
    noise: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "version": VERSION,
            **self.made_from,
            "confidences": self.confidences,
            "results": [asdict(outcome) for outcome in self.outcomes],
        }


def is_simulation(path: Path) -> bool:
    """Whether a file is the result of a simulation, which has these keys."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"cost_table", "rounds", "confidences", "results"} <= found.keys()


def simulate(
    folder: Path,
    profile: Path,
    *,
    requests: Sequence[int],
    thresholds: Sequence[float],
    tasks: Sequence[str],
    temperature: float | None,
    calibration: Path | None,
    draft_seconds: float,
) -> Simulation:
    """Replay at each number of `requests`, all of the table if none is given.

    Raises StageError for a cost table of another target, rounds that were cut by a threshold, or nothing to replay.
    Raises ConfigError for loads that were not profiled. Raises CheckpointError for a calibration of another draft or
    without confidences.
    """
    rounds = recorded_rounds(folder, tasks=tasks, temperature=temperature)
    rounds.require_uncut()
    table = read_cost_table(profile, target=rounds.report["target"])
    samples = replayable(rounds.completions)
    if not samples:
        raise StageError("No sample has a round to replay", where=folder, fix="Evaluate with more tokens or prompts.")
    if any(one.nodes is not None for sample in samples for one in sample.rounds):
        raise StageError(
            "The simulation cannot replay rounds of trees",
            where=folder,
            expected="rounds of chains",
            fix="Evaluate without [draft] tree.",
        )
    confidences = judged(samples) is not None
    fitted = None if calibration is None else _calibration(rounds, calibration, confidences)
    if fitted is not None:
        samples = _scaled(samples, fitted)
    # Tokens after an accepted stop token are not recorded, so a proposal may have been longer than its round says.
    longest = max(one.proposal_length for sample in samples for one in sample.rounds)
    outcomes = []
    for load in requests or table.batch_sizes:
        seconds = _seconds(table, load, longest)
        made = policies(longest, thresholds, confidences=confidences, draft_seconds=draft_seconds)
        for name, make in made.items():
            found = replay(
                samples, make(), name, requests=load, seconds=seconds.__getitem__, draft_seconds=draft_seconds
            )
            outcomes.append(found)
    noise = faster_with_more([step for step in table.steps if step.requests in (requests or table.batch_sizes)])
    made_from = {
        "run": rounds.report["run"],
        "draft": {name: rounds.report["draft"].get(name) for name in ("algorithm", "revision", "calibration")},
        "target": dict(rounds.report["target"]),
        "rounds": rounds.provenance(),
        "cost_table": {"digest": digest_of(profile), **table.about},
        "calibration": None if fitted is None else fitted.digest,
        "calibration_fitted_here": fitted is not None
        and any(one["prompts_digest"] in fitted.prompts for one in rounds.results),
        "draft_seconds": draft_seconds,
    }
    return Simulation(outcomes=tuple(outcomes), confidences=confidences, made_from=made_from, noise=noise)


def _seconds(table: CostTable, requests: int, longest: int) -> dict[int, float]:
    """The time of a step by its tokens, for all numbers of tokens that there can be.

    Raises ConfigError if one is unknown.
    """
    return {tokens: table.seconds(requests, tokens) for tokens in range(requests, requests * (longest + 1) + 1)}


def _calibration(rounds: RecordedRounds, path: Path, confidences: bool) -> Calibration:
    """The calibration of this file. CheckpointError or StageError where it does not fit the rounds."""
    if not confidences:
        raise CheckpointError(
            "this draft gives no confidence to calibrate",
            where=rounds.folder,
            found=f"a {rounds.report['draft'].get('algorithm')} draft whose rounds have no confidences",
            expected="a draft with a confidence head, or no calibration",
        )
    rounds.require_unscaled()
    revision = str(rounds.report["draft"].get("revision"))
    return read_calibration(path, draft_revision=revision, positions=rounds.positions)


def _scaled(samples: Sequence[Completion], fitted: Calibration) -> list[Completion]:
    """The samples with confidences scaled by the calibration."""
    return [
        evolve(
            sample,
            rounds=tuple(
                evolve(
                    one,
                    confidence=tuple(
                        logit / temperature
                        for logit, temperature in zip(one.confidence or (), fitted.temperatures, strict=False)
                    ),
                )
                for one in sample.rounds
            ),
        )
        for sample in samples
    ]
