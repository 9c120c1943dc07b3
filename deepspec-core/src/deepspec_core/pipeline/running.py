"""Runs the stages of a run in this process: makes the plan, tries it, locks the folder, discards results, runs the
stages.

The other workers of the run join it. The command line and the Python interface both use this file. It knows no stage
and starts no other process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from deepspec_core.disk import full_disk_is_an_error
from deepspec_core.errors import StageError
from deepspec_core.pipeline import stages, threads, workers
from deepspec_core.pipeline.checking import check_before
from deepspec_core.pipeline.fingerprint import flatten
from deepspec_core.pipeline.heartbeat import beating
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.stages import Step


def run_stages(
    run: Run, *, only: Sequence[str] = (), force: Sequence[str] = (), say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Do the stages of the run (or `only` some of them) that are not done yet. Returns each stage's summary.

    Results of the stages in `force`, and of those that build on them, are discarded first. Raises DeepSpecError if the
    plan is refused or a stage fails.
    """
    steps = stages.plan(run, only=only, force=force)
    begin(run, steps, say=say)
    return do(run, steps, only=only, force=force, say=say)


def begin(run: Run, steps: Sequence[Step], *, say: Callable[[str], None], processes: int = 1) -> None:
    """Say what the run computes with, then raise what would stop it later. The first of a run's messages come here."""
    threads.announce(run, [step.stage.name for step in steps if step.action != "skip"], say, processes=processes)
    check_before(run, steps, processes=processes)


def do(
    run: Run,
    steps: Sequence[Step],
    *,
    only: Sequence[str] = (),
    force: Sequence[str] = (),
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Do what the plan says, as the first (or only) process of the run, with the run's folder locked.

    `only` and `force` are those of the plan. It is made again under the lock. Raises StageError if it is another by
    now, because another process worked on the run since.
    """
    with workers.together() as crew, run.locked(), full_disk_is_an_error(run.folder):
        workers.lock_for_workers(run.folder)
        for now, before in zip(stages.plan(run, only=only, force=force), steps, strict=True):
            if now != before:
                raise StageError(
                    f"Another process changed the stage `{now.stage.name}` at the same time",
                    where=run.stage_folder(now.stage.name),
                    fix="Run again: the stage's state is then read again.",
                )
        for folder in stages.discard(run, force):
            say(f"discarded {folder}")
        run.save_config()
        crew.told_by_first("plan", _plan(run, steps))
        crew.require_shared(run.folder)
        with beating(run.folder, [step.stage.name for step in steps if step.action != "skip"]):
            return stages.execute(run, steps, say=say)


def join(run: Run, steps: Sequence[Step]) -> None:
    """Do what the plan says, as a worker other than the first one.

    Raises StageError if this worker's plan is another.
    """
    with workers.together() as crew:
        if crew.told_by_first("plan") != _plan(run, steps):
            raise StageError(
                f"Worker {crew.rank} has another run file, or sees other results, than the first worker",
                where=run.path,
                expected="the same run file, and one output folder on a file system that all machines share",
            )
        crew.require_shared(run.folder)
        with workers.held_by_worker(run.folder), full_disk_is_an_error(run.folder):
            stages.follow(run, steps)


def _plan(run: Run, steps: Sequence[Step]) -> list[str]:
    """What all workers have to agree on before they begin, in JSON types."""
    keys = json.dumps(flatten(run.file), sort_keys=True)
    return [keys, *(f"{step.action} {step.stage.name}" for step in steps)]
