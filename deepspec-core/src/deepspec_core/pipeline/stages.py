"""The stages of a run: what each reads and depends on, and whether it will run, resume, be skipped or be refused.

A stage whose keys are unchanged and whose results are complete is skipped. An interrupted stage resumes. If a key has
changed since the results were made, an error names the key, and nothing is overwritten. Imports nothing heavy: the
functions that run the stages are named as text.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final, Literal

from attrs import frozen

from deepspec_core.disk import full_disk_is_an_error
from deepspec_core.errors import StageError, nearest
from deepspec_core.locks import LOCK
from deepspec_core.pipeline import contents, heartbeat, threads, workers
from deepspec_core.pipeline.changes import digest_now, refuse_changes
from deepspec_core.pipeline.fingerprint import RECORD, StageRecord, fingerprint, flatten, read_record, schema_keys
from deepspec_core.pipeline.reads import Trace
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.exits import no_exit
from deepspec_core.plugins.references import resolve

# Files in the run's folder that are of a stage's results, by the stage. What commands fitted to a draft goes with it. A
# calibration stays where the evaluation alone is made anew, which may be in order to use it. The baselines of a
# comparison are runs of their own and stay. The table that puts this evaluation beside them goes.
_BESIDE: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("calibration.json", "calibration.sglang.json", "diagnosis.json"),
    "evaluate": (
        *("metrics.json", "report.md", "report.html", "simulation.json", "simulation.svg"),
        *("compare/comparison.json", "compare/comparison.md", "compare/comparison.html"),
    ),
}


@frozen(kw_only=True)
class Stage:
    """A stage that a run may have.

    uses: The stages whose results it builds on, if the run has them.
    makes: The names of what it leaves for later stages (contents.py). Their digests are kept when the stage has ended,
        and compared before another stage builds on them. A cache has checksums of its own.
    body: Names the function that does the stage. It is called with the run and returns a summary in JSON types.
    shared: Whether all workers of a run take part. If not, the first worker does the stage alone. Only the first one's
        summary counts.
    """

    name: str
    uses: tuple[str, ...]
    body: str
    makes: tuple[str, ...] = ()
    shared: bool = False


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="regenerate",
            uses=(),
            body="deepspec_core.pipeline.regenerating:run_stage",
            makes=(contents.REGENERATED,),
            shared=True,
        ),
        Stage(name="cache", uses=("regenerate",), body="deepspec_core.pipeline.caching:run_stage", shared=True),
        Stage(
            name="train",
            uses=("regenerate", "cache"),
            body="deepspec_core.pipeline.training:run_stage",
            makes=(contents.OWN_DRAFT,),
            shared=True,
        ),
        Stage(name="evaluate", uses=("train",), body="deepspec_core.pipeline.evaluating:run_stage", shared=True),
        Stage(
            name="export",
            uses=("train", "evaluate"),
            body="deepspec_core.pipeline.exporting:run_stage",
            makes=(contents.EXPORTS,),
        ),
    )
}

log = logging.getLogger("deepspec")

# Stands between the versions of a plugin with which a stage was begun and resumed.
_THEN: Final = ", then "

Action = Literal["run", "resume", "skip"]


@frozen(kw_only=True)
class Step:
    """What will be done about one stage of a run, and why. If `forced`, its results are discarded first."""

    stage: Stage
    action: Action
    record: StageRecord | None
    forced: bool = False


def ancestors(stage: Stage, present: Sequence[str]) -> list[Stage]:
    """The stages of the run that this one builds on, directly or through others."""
    found: list[Stage] = []
    for name in stage.uses:
        if name in present:
            found += [*ancestors(STAGES[name], present), STAGES[name]]
    return found


def plan(run: Run, *, only: Sequence[str] = (), force: Sequence[str] = ()) -> list[Step]:
    """Decide about every stage of the run, or `only` some.

    Raises StageError if keys have changed since results were made.
    """
    present = run.file.run.stages
    for name in [*only, *force]:
        if name not in present:
            raise StageError(
                f"The run has no stage `{name}`",
                where=run.path,
                expected=f"one of {', '.join(present)}",
                fix=f"Did you mean `{close}`?" if (close := nearest(name, present)) else None,
            )
    steps: list[Step] = []
    checked: dict[str, StageRecord | None] = {}
    for name in present:
        if only and name not in only:
            continue
        stage = _known(name, run)
        lineage = [*ancestors(stage, present), stage]
        for member in lineage:
            if member.name not in checked:
                record = None if _forced(member, force, present) else _record_of_results(run.stage_folder(member.name))
                if record is not None:
                    refuse_changes(run, record)
                checked[member.name] = record
        record = checked[name]
        planned = {step.stage.name for step in steps}
        missing = {
            member.name: "never ran" if (made := checked[member.name]) is None else "did not finish"
            for member in lineage[:-1]
            if member.name not in planned and ((made := checked[member.name]) is None or not made.complete)
        }
        if missing:
            wanted = [one for one in present if one in {*missing, *only}]
            raise StageError(
                f"The stage `{name}` needs the results of "
                + ", and of ".join(f"`{one}`, which {what}" for one, what in missing.items()),
                where=run.folder,
                fix=f"Run the missing stages first: --stages {','.join(wanted)}",
            )
        action: Action = "run" if record is None else "skip" if record.complete else "resume"
        exported = action == "skip" and record is not None and contents.EXPORTS in record.made
        if exported and digest_now(run, contents.EXPORTS, resuming=False) is None:
            action = "resume"  # an export was moved away or deleted
        steps.append(Step(stage=stage, action=action, record=record, forced=_forced(stage, force, present)))
    return steps


def _forced(stage: Stage, force: Sequence[str], present: Sequence[str]) -> bool:
    """Whether a stage's results are to be discarded, because of itself or of one that it builds on."""
    return any(one.name in force for one in [*ancestors(stage, present), stage])


def _record_of_results(folder: Path) -> StageRecord | None:
    """The stage's record; None if there is none, or if the stage failed before it had a result."""
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


def discard(run: Run, force: Sequence[str]) -> list[Path]:
    """Remove the results of forced stages and of the stages that build on them. Returns the folders emptied."""
    emptied = []
    for name in run.file.run.stages:
        stage = _known(name, run)
        if _forced(stage, force, run.file.run.stages):
            folder = run.stage_folder(name)
            # Without a record, nothing there is a stage's: a cache path may point elsewhere by mistake.
            if (folder / RECORD).exists():
                with _alone(run, name):
                    for entry in folder.iterdir():
                        if entry.is_dir() and not entry.is_symlink():
                            shutil.rmtree(entry)
                        elif entry.name != LOCK:  # others may be waiting for it
                            entry.unlink()
                for made in _BESIDE.get(name, ()):
                    (run.folder / made).unlink(missing_ok=True)
                emptied.append(folder)
    return emptied


def execute(run: Run, steps: Sequence[Step], *, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Do what the plan says, in order. Returns each stage's summary. The record of an interrupted stage stays open."""
    summaries: dict[str, dict[str, Any]] = {}
    counts = _threads(run, steps)
    for step in steps:
        name = step.stage.name
        if step.action == "skip":
            assert step.record is not None
            summaries[name] = step.record.summary
            say(f"{name}: already complete ({step.record.seconds:.0f} s), nothing to do")
            continue
        _require_ancestors(run, step.stage)
        with _alone(run, name), threads.using(counts[name]):
            record = _do(run, step, say)
        summaries[name] = record.summary
        say(f"{name}: done in {record.seconds:.0f} s{_in_words(record.summary)}")
    return summaries


def _do(run: Run, step: Step, say: Callable[[str], None]) -> StageRecord:
    """Do one stage. At every moment its record on disk names everything that was read so far."""
    name, folder, before, start = step.stage.name, run.stage_folder(step.stage.name), step.record, time.monotonic()
    # All keys are looked at here, before what the stage reads is noted.
    flat, known, versions = flatten(run.file), sorted(schema_keys(run.file)), _versions(run, name, before)

    def record_of(read: Trace, *, complete: bool = False, summary: dict[str, Any] | None = None) -> StageRecord:
        if before is not None:
            # Some of the results may come from an earlier process, which read these keys.
            read = Trace({*before.names_read, *read.keys}, {**before.content, **read.content})
        return StageRecord(
            stage=name,
            keys=fingerprint(flat, sorted(read.keys)),
            complete=complete,
            seconds=time.monotonic() - start + (before.seconds if before else 0.0),
            plugins=versions,
            summary=summary or {},
            reads=sorted(read.keys),
            content=read.content,
            made=_made(run, step.stage) if complete else {},
            known=known,
        )

    def keep(read: Trace) -> None:
        record_of(read).write(folder)

    if _record_of_results(folder) != before:
        raise StageError(
            f"Another process changed the stage `{name}` at the same time",
            where=folder,
            fix="Run again: the stage's state is then read again.",
        )
    keep(Trace())
    heartbeat.enter(name)
    say(f"{name}: {'resuming' if step.action == 'resume' else 'starting'}")
    try:
        with run.reads.traced(on_growth=keep) as read, full_disk_is_an_error(folder):
            try:
                with no_exit():
                    summary = resolve(step.stage.body)(run)
            except BaseException:
                with suppress(OSError):  # a full disk, perhaps; the record that names these keys is there
                    keep(read)
                raise
            if step.stage.shared:
                _require_same_reading(name, read)
    finally:
        run.cache.let_go()
    record = record_of(read, complete=True, summary=summary)
    record.write(folder)
    return record


def _versions(run: Run, name: str, before: StageRecord | None) -> dict[str, str]:
    """The installed plugins' versions. A stage that is resumed with others is warned about, and keeps both."""
    now = run.plugins.versions()
    if before is None:
        return now
    changed = {plugin: old for plugin, old in before.plugins.items() if old.rpartition(_THEN)[2] != now.get(plugin)}
    for plugin, old in changed.items():
        log.warning("%s: resumed with %s %s, but started with %s", name, plugin, now.get(plugin, "not installed"), old)
    return now | {plugin: f"{old}{_THEN}{now.get(plugin, 'not installed')}" for plugin, old in changed.items()}


def _made(run: Run, stage: Stage) -> dict[str, str]:
    digests = {name: digest_now(run, name, resuming=False) for name in stage.makes}
    return {name: digest for name, digest in digests.items() if digest is not None}


def _alone(run: Run, name: str) -> AbstractContextManager[object]:
    """Lock a cache outside the run's folder, because other runs may use it. The run's own folder is locked already."""
    return run.cache.locked() if name == "cache" else nullcontext()


def follow(run: Run, steps: Sequence[Step]) -> None:
    """Do what workers other than the first do: take part in shared stages, and wait for the first to end each one."""
    counts = _threads(run, steps)
    for step in steps:
        if step.action == "skip":
            continue
        if step.stage.shared:
            for ancestor in ancestors(step.stage, run.file.run.stages):
                workers.wait_for(run.stage_folder(ancestor.name))
            try:
                with threads.using(counts[step.stage.name]), run.reads.traced() as read, no_exit():
                    resolve(step.stage.body)(run)
                    _require_same_reading(step.stage.name, read)
            finally:
                run.cache.let_go()
        workers.wait_for(run.stage_folder(step.stage.name))


def _threads(run: Run, steps: Sequence[Step]) -> dict[str, int]:
    names = [step.stage.name for step in steps if step.action != "skip"]
    return threads.choose(run, names, processes=workers.on_this_machine())


def _require_same_reading(name: str, read: Trace) -> None:
    """StageError where workers read different content under one name: on another machine a file may be another one."""
    crew = workers.crew()
    for rank, content in enumerate(crew.gather(f"{name} read", read.content)):
        for what, digest in content.items():
            if digest != read.content.get(what, digest):
                raise StageError(
                    f"The workers of this run read different inputs: {what} differs",
                    where=f"workers {crew.rank} and {rank}, stage `{name}`",
                    found=digest[:16],
                    expected=read.content[what][:16],
                    fix="Give all machines the same files, then discard the stage's results: --force " + name,
                )


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
    """What a stage did and dropped, in one line. Zeros and nested figures are in the file only."""
    return "".join(f", {key} {value}" for key, value in summary.items() if value and not isinstance(value, dict))
