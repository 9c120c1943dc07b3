"""Checks that no stage writes over or discards a run's cache or inputs.

Knows folders. Of their contents it knows only how to tell a cache from other files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepspec_core.config.schema import BUILTIN
from deepspec_core.errors import ConfigError, StageError
from deepspec_core.evaluation.tasks import task_file
from deepspec_core.locks import LOCK
from deepspec_core.pipeline.fingerprint import RECORD
from deepspec_core.pipeline.run import Run


def check_cache_place(run: Run) -> None:
    """Raise ConfigError for a cache.path where other files are, or belong: the cache's folder is the cache's alone."""
    if run.file.cache.path is None:
        return
    folder, reason = run.cache.folder.resolve(), None
    if run.folder.is_relative_to(folder):
        reason = "the run's output, or a folder that holds it"
    elif run.base.is_relative_to(folder):
        reason = "the folder of the run file, or one that holds it"
    else:
        others = [stage for stage in run.file.run.stages if stage != "cache"]
        for place in (*(run.folder / stage for stage in others), run.folder / "draft"):
            if folder.is_relative_to(place):
                reason = f"in {place.name}/, where the run puts other results"
    if reason is None and _holds_other_files(run, folder):
        reason = "a folder with files that are no cache"
    if reason is not None:
        raise ConfigError(
            "the cache cannot be put into this folder",
            where="cache.path",
            found=f"{run.file.cache.path}: {reason}",
            expected="a separate folder: an empty one, one that does not exist yet, or a cache",
        )


def _holds_other_files(run: Run, folder: Path) -> bool:
    if not folder.is_dir() or (folder / RECORD).exists() or run.cache.format.header(folder) is not None:
        return False
    return any(entry.name != LOCK for entry in folder.iterdir())


def check_inputs_survive(run: Run, discarded: Sequence[str]) -> None:
    """StageError if something that the run reads lies in the folder of a stage that is to be discarded: a source, a
    task, a draft to begin with or to evaluate, its calibration, a cost table or the exchange folder of servers."""
    inputs = {f"data.sources[{i}]": source.path for i, source in enumerate(run.file.data.sources)}
    inputs |= {f"evaluate.tasks[{i}]": task_file(task) or task for i, task in enumerate(run.file.evaluate.tasks)}
    if run.file.evaluate.draft is not None:
        inputs["evaluate.draft"] = run.file.evaluate.draft
    if run.file.draft.init is not None:
        inputs["draft.init"] = run.file.draft.init
    if run.file.evaluate.calibration is not None:
        inputs["evaluate.calibration"] = run.file.evaluate.calibration
    if run.file.evaluate.scheduler is not None:
        inputs["evaluate.scheduler.cost_table"] = run.file.evaluate.scheduler.cost_table
    if run.file.features.exchange is not None:
        inputs["features.exchange"] = run.file.features.exchange
    folders = [run.stage_folder(stage).resolve() for stage in discarded]
    for key, path in inputs.items():
        place = (run.base / path).resolve()
        inside = [folder for folder in folders if place.is_relative_to(folder)]
        if inside and not path.startswith(BUILTIN) and place.exists():
            raise StageError(
                "--force would discard files that the run reads",
                where=key,
                found=f"{path}, in {inside[0]}",
                expected="files outside the folders that --force discards",
                fix="Copy the files to another folder, and name the copy.",
            )
