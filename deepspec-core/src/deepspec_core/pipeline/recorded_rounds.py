"""The rounds that a finished evaluation recorded, selected by task and temperature, and the draft that decoded them.

Knows metrics.json and the journals of a run's folder. Needs no run file and loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from deepspec_core.checkpoints.opening import resolve_draft
from deepspec_core.decoding.engine import Completion
from deepspec_core.disk import is_folder
from deepspec_core.errors import CheckpointError, ConfigError, StageError, nearest
from deepspec_core.evaluation.evaluator import recorded
from deepspec_core.evaluation.metrics_file import NAME as METRICS
from deepspec_core.evaluation.metrics_file import read_metrics
from deepspec_core.evaluation.reliability import Judged, judged
from deepspec_core.evaluation.report import once, task_of
from deepspec_core.evaluation.tasks import task_name
from deepspec_core.pipeline.evaluating import journal_of
from deepspec_core.targets.opening import fingerprint

_AGAIN = "Evaluate again with --force evaluate."


@frozen(kw_only=True)
class RecordedRounds:
    """Finished sequences of one temperature. `report` is metrics.json, and `results` are those of its results."""

    folder: Path
    report: Mapping[str, Any]
    results: tuple[Mapping[str, Any], ...]
    completions: tuple[Completion, ...]

    @property
    def temperature(self) -> float:
        """The temperature of decoding."""
        return float(self.results[0]["temperature"])

    @property
    def positions(self) -> int:
        """How many tokens the draft proposes at most."""
        return int(self.report["draft"]["max_tokens"])

    def provenance(self) -> dict[str, Any]:
        """What the rounds are of, in plain JSON types: tasks with the digests of their prompts, and counts."""
        return {
            "temperature": self.temperature,
            "tasks": [
                {"task": task_of(one), "prompts_digest": one["prompts_digest"], "samples": one["samples"]}
                for one in self.results
            ],
            "samples": len(self.completions),
            "rounds": sum(len(completion.rounds) for completion in self.completions),
        }

    def require_uncut(self) -> None:
        """StageError if proposals were cut, because the rest of what the draft would have proposed is not recorded."""
        self._require_without("scheduler", self.report["settings"].get("scheduler"), "no scheduler")
        self._require_without(
            "confidence_threshold", self.report["settings"].get("confidence_threshold"), "threshold 0"
        )

    def require_unscaled(self) -> None:
        """Raise StageError if a calibration scaled the recorded confidences already."""
        self._require_without("calibration", self.report["draft"].get("calibration"), "no calibration")

    def judged(self) -> Judged:
        """The rounds with the draft's own confidences. Raises CheckpointError if the draft gives none.

        Raises StageError if the rounds were cut or scaled, or no token was proposed.
        """
        found = judged(self.completions)
        if found is None and any(completion.rounds for completion in self.completions):
            raise CheckpointError(
                "this draft gives no confidence to calibrate",
                where=self.folder / METRICS,
                found=f"a {self.report['draft'].get('algorithm')} draft whose rounds have no confidences",
                expected="a draft with a confidence head",
            )
        self.require_uncut()
        self.require_unscaled()
        if found is None or not found.proposed.any():
            raise StageError("No round has a proposed token", where=self.folder / METRICS, fix=_AGAIN)
        return found

    def _require_without(self, what: str, value: object, instead: str) -> None:
        if value:
            raise StageError(
                "The confidences of these rounds were changed or cut by other settings",
                where=self.folder / METRICS,
                found=f"[evaluate] {what} = {value}",
                expected=f"rounds that were decoded with {instead}",
                fix="Evaluate again with this setting, and another run.output to keep the present results.",
            )


def recorded_rounds(folder: Path, *, tasks: Sequence[str] = (), temperature: float | None = None) -> RecordedRounds:
    """The rounds of some tasks (all if none are named) at a temperature (the highest if None), in both modes.

    Of several batch sizes the first is read.

    Raises StageError if there is no finished evaluation, or a journal is not that of metrics.json; raises ConfigError
    for a task or a temperature that was not evaluated; raises DataError for a damaged journal.
    """
    try:
        report = read_metrics(folder / METRICS)
    except FileNotFoundError:
        raise StageError(
            "There is no evaluation in this folder",
            where=folder,
            expected=f"a run's folder with {METRICS}, or its run file",
            fix="Run its evaluate stage first.",
        ) from None
    results = _chosen(once(report["results"]), tasks, temperature, folder / METRICS)
    completions = [completion for result in results for completion in completions_of(folder, report, result)]
    return RecordedRounds(folder=folder, report=report, results=tuple(results), completions=tuple(completions))


def unchanged_draft(rounds: RecordedRounds) -> Path:
    """The directory of the draft that the rounds are of.

    Raises CheckpointError if it is gone, StageError if it changed.
    """
    named = str(rounds.report["draft"].get("checkpoint"))
    # Files of before have what the run file says.
    of_before = not is_folder(rounds.folder / named) and is_folder(Path(named))
    place = resolve_draft(named, base=Path() if of_before else rounds.folder)
    now, then = fingerprint(place), str(rounds.report["draft"].get("revision"))
    if now != then:
        raise StageError(
            "The draft changed since its evaluation",
            where=place,
            found=now[:16],
            expected=f"{then[:16]}, whose rounds were recorded",
            fix=_AGAIN,
        )
    return place


def _chosen(
    results: Sequence[Mapping[str, Any]], tasks: Sequence[str], temperature: float | None, where: Path
) -> list[Mapping[str, Any]]:
    names = {str(result["task"]) for result in results}
    for task in tasks:
        if not names & {task} and task not in {task_name(name) for name in names}:
            near = nearest(task, names)
            raise ConfigError(
                f"the task {task!r} was not evaluated",
                where=where,
                expected=", ".join(sorted(names)) or "a task",
                fix=f"Did you mean {near!r}?" if near else None,
            )
    if tasks:
        results = [one for one in results if one["task"] in tasks or task_name(one["task"]) in tasks]
    known = sorted({float(one["temperature"]) for one in results})
    asked = max(known, default=0.0) if temperature is None else temperature
    if asked not in known:
        raise ConfigError(
            "that temperature was not evaluated",
            where=where,
            found=f"{asked:g}",
            expected=", ".join(f"{value:g}" for value in known) or "an evaluation with results",
        )
    return [one for one in results if float(one["temperature"]) == asked]


def completions_of(folder: Path, report: Mapping[str, Any], result: Mapping[str, Any]) -> list[Completion]:
    """The answers of one result of `report`, the metrics.json in `folder`.

    Raises StageError if its journal is missing or another one; raises DataError if that is damaged.
    """
    path = journal_of(folder, result)
    digest, groups = recorded(path, max_tokens=report["draft"].get("max_tokens"))
    completions = [completion for group in groups for completion in group.completions]
    found = (digest, len(completions), sum(len(completion.rounds) for completion in completions))
    said = (result.get("prompts_digest"), result["samples"], result.get("rounds"))
    if found != said:
        raise StageError(
            f"A journal does not belong to {METRICS}",
            where=path,
            found=f"{found[1]} samples, {found[2]} rounds, prompts {found[0][:12]}",
            expected=f"{said[1]} samples, {said[2]} rounds, prompts {str(said[0])[:12]}",
            fix=_AGAIN,
        )
    return completions
