"""The stages of a run: what each reads, what it builds on, and whether it is to run, resume, be skipped or be refused.

A stage whose keys are unchanged and whose results are complete is skipped; an interrupted one resumes; changed keys on
a stage that has results are an error naming the key, never a silent overwrite. Imports nothing heavy: bodies are text.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import evolve, frozen

from deepspec_core.errors import StageError, nearest
from deepspec_core.pipeline import threads, workers
from deepspec_core.pipeline.fingerprint import RECORD, StageRecord, differences, fingerprint, flatten, read_record
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.references import resolve


@frozen(kw_only=True)
class Stage:
    """`reads`: keys and sections whose change makes results stale. `uses`: stages whose results it builds on, where the
    run has them. `body` is called with the run and returns a summary in JSON types. `shared`: all workers of a run take
    part; the others are the first worker's alone."""

    name: str
    reads: tuple[str, ...]
    uses: tuple[str, ...]
    body: str
    shared: bool = False


_TARGET = ("target.model", "target.revision", "target.dtype")
_DATA = ("data.sources", "data.held_out", "data.system_prompt", "data.max_length", "run.seed")
_SUPERVISION = ("data.min_supervised_tokens", "data.supervise_newline", "data.supervise_think_block")

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="regenerate",
            reads=(
                *_TARGET,
                *_DATA,
                *(f"regenerate.{key}" for key in ("thinking", "max_tokens", "temperature", "top_p", "top_k", "min_p")),
            ),
            uses=(),
            body="deepspec_core.pipeline.regenerating:run_stage",
        ),
        Stage(
            name="cache",
            reads=(
                *_TARGET,
                *_DATA,
                *_SUPERVISION,
                "target.layers",
                "cache.format",
                "cache.dtype",
                "cache.path",
            ),
            uses=("regenerate",),
            body="deepspec_core.pipeline.caching:run_stage",
        ),
        Stage(
            name="train",
            reads=(
                *_TARGET,
                *_DATA,
                *_SUPERVISION,
                "target.layers",
                "features",
                "draft",
                "loss.terms",
                "loss.weighting",
                *(
                    f"train.{key}"
                    for key in (
                        "lr",
                        "global_batch_size",
                        "epochs",
                        "max_steps",
                        "warmup",
                        "weight_decay",
                        "betas",
                        "clip_norm",
                        "precision",
                    )
                ),
            ),
            uses=("regenerate", "cache"),
            body="deepspec_core.pipeline.training:run_stage",
            shared=True,
        ),
        Stage(
            name="evaluate",
            reads=(*_TARGET, "target.layers", "data.sources", "data.system_prompt", "evaluate"),
            uses=("train",),
            body="deepspec_core.pipeline.evaluating:run_stage",
        ),
    )
}

Action = Literal["run", "resume", "skip"]


@frozen(kw_only=True)
class Step:
    """What is to be done about one stage of a run, and why."""

    stage: Stage
    action: Action
    keys: dict[str, Any]
    record: StageRecord | None


def ancestors(stage: Stage, present: Sequence[str]) -> list[Stage]:
    """The stages it builds on, directly or not, among those the run has."""
    found: list[Stage] = []
    for name in stage.uses:
        if name in present:
            found += [*ancestors(STAGES[name], present), STAGES[name]]
    return found


def plan(run: Run, *, only: Sequence[str] = (), force: Sequence[str] = ()) -> list[Step]:
    """Decide about every stage of the run (or `only` some of them). StageError where settings changed under results."""
    present = run.file.run.stages
    for name in [*only, *force]:
        if name not in present:
            raise StageError(
                f"The run has no stage `{name}`",
                where=run.path,
                expected=f"one of {', '.join(present)}",
                fix=f"Did you mean `{close}`?" if (close := nearest(name, present)) else None,
            )
    flat = flatten(run.file)
    steps: list[Step] = []
    for name in present:
        if only and name not in only:
            continue
        stage = _known(name, run)
        lineage = [*ancestors(stage, present), stage]
        keys = fingerprint(flat, [key for member in lineage for key in member.reads])
        forced = [member.name for member in lineage if member.name in force]
        record = None if forced else _record_of_results(run.stage_folder(name))
        if record is not None:
            _refuse_changes(run, stage, record, keys)
        action: Action = "run" if record is None else "skip" if record.complete else "resume"
        steps.append(Step(stage=stage, action=action, keys=keys, record=record))
    return steps


def _record_of_results(folder: Path) -> StageRecord | None:
    """The stage's record, None where there is none or the stage failed before it had any result."""
    record = read_record(folder)
    if record is None or record.complete:
        return record
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return record if any(path.stat().st_size for path in files) else None


def _known(name: str, run: Run) -> Stage:
    if name not in STAGES:
        raise StageError(
            f"The stage `{name}` has nothing to do yet in this version",
            where=f"{run.path}: run.stages",
            expected=f"stages among {', '.join(STAGES)}",
            fix=f'Remove "{name}" from run.stages.',
        )
    return STAGES[name]


def _refuse_changes(run: Run, stage: Stage, record: StageRecord, keys: dict[str, Any]) -> None:
    changes = differences(record.keys, keys)
    if not changes:
        return
    key, old, new = changes[0]
    more = f" (and {len(changes) - 1} more: {', '.join(name for name, _, _ in changes[1:6])})" if changes[1:] else ""
    raise StageError(
        f"`{key}` changed under the results of the stage `{stage.name}`{more}",
        where=run.stage_folder(stage.name),
        found=f"{key} = {new}",
        expected=f"{key} = {old}, which the results were made with",
        fix=f"Set it back, choose another run.output, or discard the results with --force {stage.name}.",
    )


def discard(run: Run, force: Sequence[str]) -> list[Path]:
    """Remove the results of forced stages and of all that build on them; returns the folders removed."""
    removed = []
    for name in run.file.run.stages:
        stage = _known(name, run)
        if any(member.name in force for member in [*ancestors(stage, run.file.run.stages), stage]):
            folder = run.stage_folder(name)
            # Only what a stage made is removed: a cache path that points elsewhere by mistake holds no record.
            if read_record(folder) is not None:
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


def execute(run: Run, steps: Sequence[Step], *, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Do what the plan says, in order; returns each stage's summary. An interrupted stage keeps its open record."""
    summaries: dict[str, dict[str, Any]] = {}
    counts = _threads(run, steps)
    if counts:
        say(threads.in_words(counts, given=run.file.run.threads is not None))
    for step in steps:
        name = step.stage.name
        if step.action == "skip":
            assert step.record is not None
            summaries[name] = step.record.summary
            say(f"{name}: already complete ({step.record.seconds:.0f} s), nothing to do")
            continue
        _require_ancestors(run, step.stage)
        folder = run.stage_folder(name)
        record = StageRecord(
            stage=name,
            keys=step.keys,
            complete=False,
            seconds=step.record.seconds if step.record else 0.0,
            plugins=run.plugins.versions(),
            summary={},
        )
        record.write(folder)
        say(f"{name}: {'resuming' if step.action == 'resume' else 'starting'}")
        start = time.monotonic()
        try:
            with threads.using(counts[name]):
                summary = resolve(step.stage.body)(run)
        except BaseException:
            evolve(record, seconds=record.seconds + time.monotonic() - start).write(folder)
            raise
        record = evolve(record, complete=True, seconds=record.seconds + time.monotonic() - start, summary=summary)
        record.write(folder)
        summaries[name] = summary
        say(f"{name}: done in {record.seconds:.0f} s{_in_words(summary)}")
    return summaries


def follow(run: Run, steps: Sequence[Step]) -> None:
    """What a worker other than the first does: take part in shared stages, wait for the rest."""
    counts = _threads(run, steps)
    for step in steps:
        if step.action == "skip":
            continue
        if step.stage.shared:
            for ancestor in ancestors(step.stage, run.file.run.stages):
                workers.wait_for(run.stage_folder(ancestor.name))
            with threads.using(counts[step.stage.name]):
                resolve(step.stage.body)(run)
        workers.wait_for(run.stage_folder(step.stage.name))


def _threads(run: Run, steps: Sequence[Step]) -> dict[str, int]:
    return threads.choose(run, [step.stage.name for step in steps if step.action != "skip"])


def _require_ancestors(run: Run, stage: Stage) -> None:
    for ancestor in ancestors(stage, run.file.run.stages):
        record = read_record(run.stage_folder(ancestor.name))
        if record is None or not record.complete:
            raise StageError(
                f"The stage `{stage.name}` needs the results of `{ancestor.name}`, which "
                + ("never ran" if record is None else "did not finish"),
                where=run.stage_folder(ancestor.name),
                fix=f"Run it first: --stages {ancestor.name},{stage.name}",
            )


def _in_words(summary: dict[str, Any]) -> str:
    """What a stage did, and what it dropped; counts of nothing and nested figures are left to the file."""
    return "".join(f", {key} {value}" for key, value in summary.items() if value and not isinstance(value, dict))
