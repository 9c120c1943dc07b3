"""Evaluations of the draft during training: when they happen, their results, and which checkpoints are the best.

An evaluation decodes with a checkpoint, never with the draft that is being trained. So it does not affect training, and
if a run is killed in between, it finds the checkpoint and evaluates it after it resumes. Results are written to
evaluations.jsonl. All workers decode and reach the same decisions; the first one writes. Knows records and checkpoints.
Does not know how a draft is decoded.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

from attrs import asdict, frozen

from deepspec_core.config.schema import BEST, TrainOptions
from deepspec_core.crew import ALONE, Crew
from deepspec_core.errors import CheckpointError
from deepspec_core.journal import Journal
from deepspec_core.training import checkpoint as checkpoints
from deepspec_core.training.fallback import first_sound, set_aside
from deepspec_core.training.metrics import MetricsLog

log = logging.getLogger("deepspec")

EVALUATIONS: Final = "evaluations.jsonl"
# Names in metrics.jsonl, by the names in a record.
_FIGURES: Final = {
    "accepted_length": "held_out/accepted_length",
    "seconds": "held_out/seconds",
    "time_share": "held_out/time_share",
}
_ESTIMATE: Final = "tau_probabilistic"
# Numbers in a record are below this, so that arithmetic with them is exact or rounds.
_MOST: Final = 2**53
_ROUNDING: Final = 1e-9


@frozen(kw_only=True)
class Decoded:
    """The result of decoding the held-out prompts.

    accepted_length: Tokens committed per round, over all rounds; interval: its 95% bootstrap interval over prompts.
    failures: Prompts on which decoding failed. They count in no figure.
    """

    accepted_length: float
    interval: tuple[float, float]
    prompts: int
    failures: int
    rounds: int
    tokens: int


class Decode(Protocol):
    """Decodes the held-out prompts with the draft of a directory, together with the other workers.

    It calls `check` from time to time, which raises an error if the run is to stop.
    """

    def __call__(self, draft: Path, check: Callable[[], None]) -> Decoded: ...


class Evaluations:
    """The evaluations of one training. Without `decode` there are none, and the last checkpoint is the finished draft.

    A record is {"step", "epoch", "accepted_length", "interval", "tau_probabilistic", "prompts", "failures", "rounds",
    "tokens", "seconds", "time_share"}. tau_probabilistic is the teacher-forced estimate of the same step on its
    training samples, None where that step has no line of figures. time_share: the share of this process's training
    time that its evaluations took so far.
    """

    def __init__(self, options: TrainOptions, decode: Decode | None = None, *, crew: Crew = ALONE) -> None:
        assert decode is not None or options.evaluate_every is None, "evaluations need something that decodes"
        self._options, self._decode, self._crew = options, decode, crew
        self._journal: Journal | None = None
        self._log: MetricsLog | None = None
        self.records: list[dict[str, Any]] = []
        self._seconds = 0.0
        self.damaged = 0  # checkpoints that were set aside when the finished draft was chosen

    def begin(
        self, folder: Path, log: MetricsLog | None, save: Callable[[int], None], *, done: int, total: int, epoch: int
    ) -> None:
        """Read the results up to step `done`, and evaluate its checkpoint if that is due.

        Later records are removed, as they will be found again. `log` is the first worker's metrics.jsonl; `save` writes
        the checkpoint of step 0; `total` and `epoch` are numbers of steps. Raises CheckpointError if a record is
        damaged.
        """
        self._folder, self._log, self._total, self._epoch = folder, log, total, epoch
        self._start = time.monotonic()
        if self._decode is None:
            return
        if self._crew.first:
            self._journal, self.records = _resumed(folder / EVALUATIONS, done)
        self.records = self._crew.told_by_first("evaluations", self.records)
        for record in self.records:
            self._tell(record)
        if self.due(done):
            if done == 0:
                save(0)
            self.evaluate(done)

    def due(self, step: int) -> bool:
        """Whether the checkpoint of this step is to be evaluated: at the start, at regular intervals, at the end."""
        every = self._options.evaluate_every
        if self._decode is None or every is None or any(record["step"] == step for record in self.records):
            return False
        return step % every == 0 or step == self._total

    def evaluate(self, step: int, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Evaluate the checkpoint of this step. Returns the figures that its line of metrics.jsonl got."""
        assert self._decode is not None, "an evaluation is due"
        checkpoint, start = checkpoints.of_step(self._folder, step), time.monotonic()
        decoded = self._decode(checkpoint / checkpoints.DRAFT, check)
        seconds = time.monotonic() - start
        self._seconds += seconds
        line = {} if self._log is None else self._log.of_step(step)
        record = {
            "step": step,
            "epoch": round(step / self._epoch, 4),
            **asdict(decoded),
            _ESTIMATE: line.get(_ESTIMATE),
            "seconds": round(seconds, 3),
            "time_share": round(self._seconds / max(time.monotonic() - self._start, 1e-9), 4),
        }
        self.records.append(record)
        if self._journal is not None:
            self._journal.append(record)
            self._say(record)
            keep, spare = self._options.keep_checkpoints, self.spared()
            checkpoints.prune(self._folder, keep=keep, spare=spare)
        return self._tell(record)

    def over(self) -> bool:
        """Whether training ends early, because the accepted length fell too often in a row."""
        most = self._options.evaluation.stop_after
        return most is not None and self.falls() >= most

    def falls(self) -> int:
        """The number of evaluations in a row, up to the last one, that were each lower than the one before."""
        lengths = [record["accepted_length"] for record in self.records]
        count = 0
        while count + 1 < len(lengths) and lengths[-1 - count] < lengths[-2 - count]:
            count += 1
        return count

    def spared(self) -> frozenset[int]:
        """The steps whose checkpoints stay because they are the best."""
        there = (record["step"] for record in self._ranked() if self._checkpoint(record).is_dir())
        return frozenset(islice(there, self._options.keep_best))

    def chosen(self, last: Path) -> Path:
        """The checkpoint that becomes the finished draft. `last` is the newest, which this training wrote or read.

        The best that is as it was written. Damaged ones are set aside and counted; raises CheckpointError if all are.
        """
        if not self.records or self._options.final != BEST:
            return last
        step = self._best_sound(last) if self._crew.first else None
        return checkpoints.of_step(self._folder, self._crew.told_by_first("finished draft", step))

    def _best_sound(self, last: Path) -> int:
        """The step of the best checkpoint that is sound, or that of `last` where no best one is there."""
        ranked, newest = self._ranked(), self.records[-1]
        there = [path for path in map(self._checkpoint, ranked) if path.is_dir()]
        found = first_sound(dict.fromkeys([*there, last]), checkpoints.verify)
        assert found is not None, "there is a last one"
        step, self.damaged = checkpoints.step_of(found[0]), len(found[2])
        for path, damage in found[2]:
            set_aside(path, damage, f"the finished draft is that of step {step}")
        if self._checkpoint(ranked[0]) not in there:
            log.warning(
                "the checkpoint of step %d, the best on held-out prompts, is missing; the "
                "finished draft is that of step %d",
                ranked[0]["step"],
                step,
            )
        best = next((record for record in ranked if record["step"] == step), newest)
        if best is not newest:
            log.info(
                "the finished draft is that of step %d, with an accepted length of %.3f on held-out prompts; the last, "
                "of step %d, has %.3f",
                best["step"],
                best["accepted_length"],
                newest["step"],
                newest["accepted_length"],
            )
        return step

    def _checkpoint(self, record: Mapping[str, Any]) -> Path:
        return checkpoints.of_step(self._folder, record["step"])

    def _ranked(self) -> list[dict[str, Any]]:
        """Records by accepted length; of equal ones, the later first, which has learned from more samples."""
        return sorted(self.records, key=lambda record: (record["accepted_length"], record["step"]), reverse=True)

    def _tell(self, record: Mapping[str, Any]) -> dict[str, float]:
        figures = {name: record[key] for key, name in _FIGURES.items()}
        if self._log is not None:
            self._log.add(record["step"], figures)
        return figures

    def _say(self, record: Mapping[str, Any]) -> None:
        low, high = record["interval"]
        failed = f", {record['failures']} prompts failed" if record["failures"] else ""
        estimate = "" if record[_ESTIMATE] is None else f"; the estimate in training: {record[_ESTIMATE]:.3f}"
        log.info(
            "step %d: accepted length %.3f (%.3f to %.3f) on %d held-out prompts in %.1f s%s",
            record["step"],
            record["accepted_length"],
            low,
            high,
            record["prompts"],
            record["seconds"],
            failed + estimate,
        )
        falls, options = self.falls(), self._options.evaluation
        if falls >= options.warn_after:
            fallen = [f"{one['accepted_length']:.3f}" for one in self.records[-falls - 1 :]]
            log.warning(
                "the accepted length on held-out prompts has fallen %d times in a row, up to step %d: %s. The best is "
                "that of step %d.",
                falls,
                record["step"],
                ", ".join(fallen),
                self._ranked()[0]["step"],
            )
        if self.over() and record["step"] < self._total:
            log.warning("training ends at step %d of %d: train.evaluation.stop_after", record["step"], self._total)


def _resumed(path: Path, resume_at: int) -> tuple[Journal, list[dict[str, Any]]]:
    """The journal at `path` without the records after step `resume_at`, and those that stay."""
    journal = Journal(path)
    last = -1
    for number, record in enumerate(journal.entries, start=1):
        if not _sound(record, last):
            raise CheckpointError(
                "damaged record of an evaluation",
                where=f"{path}:{number}",
                found=json.dumps(record)[:80],
                fix="Remove that line and those after it, or train again from the start with --force train.",
            )
        last = record["step"]
    kept = [record for record in journal.entries if record["step"] <= resume_at]
    if len(kept) < len(journal.entries):
        journal.close()
        new = path.with_name(f".{path.name}.new")
        new.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        os.replace(new, path)
        journal = Journal(path)
    return journal, kept


def _sound(record: Mapping[str, Any], after: int) -> bool:
    """Whether a record is one that `evaluate` writes, of a step later than `after`."""
    interval = record.get("interval")
    if not isinstance(interval, list) or len(interval) != 2:
        return False
    counts: list[Any] = [record.get(name) for name in ("step", "prompts", "failures", "rounds", "tokens")]
    length: Any = record.get("accepted_length")
    figures: list[Any] = [length, *interval, *(record.get(name) for name in ("epoch", "seconds", "time_share"))]
    if record.get(_ESTIMATE) is not None:
        figures.append(record[_ESTIMATE])
    if not all(type(one) is int and 0 <= one < _MOST for one in counts):
        return False
    if not all(type(one) in (int, float) and 0 <= one < _MOST for one in figures):
        return False
    step, prompts, _, rounds, tokens = counts
    # The committed tokens are a whole number, at least one per round. An answer's first token belongs to no round, and
    # tokens that the last round commits beyond the answer's end are not among the answer's tokens.
    committed = round(length * rounds)
    return bool(
        step > after
        and abs(length * rounds - committed) <= _ROUNDING * committed
        and committed >= max(rounds, tokens - prompts)
        and interval[0] * (1 - _ROUNDING) <= length <= interval[1] * (1 + _ROUNDING)
    )
