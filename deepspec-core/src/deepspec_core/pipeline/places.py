"""Checks the places where a run writes: folders can be made and written to, and no other file has the name of one of
them.

Knows the names of the files that stages write; does not know their contents. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

from deepspec_core.disk import refuse_folder, why_not_writable
from deepspec_core.errors import StageError
from deepspec_core.locks import LOCK
from deepspec_core.pipeline.fingerprint import RECORD
from deepspec_core.pipeline.heartbeat import STATUS
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.run_data import TOKENS
from deepspec_core.training.metrics_lines import METRICS
from deepspec_core.training.trackers import STATE as TRACKERS

_OF_EVERY_STAGE: Final = (RECORD, f"{RECORD}.partial")
# Files of stages in their own folders. Those of a cache beside its lock are its format's.
_OF_STAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "regenerate": tuple(
        f"conversations.jsonl{end}" for end in ("", ".partial", ".partial.sound", ".ordered", ".failures.jsonl")
    ),
    "cache": (LOCK,),
    "train": (METRICS, TRACKERS, "evaluations.jsonl"),
    "evaluate": ("samples.json", "samples.json.partial"),
}
# Files of stored tokens in a folder of their own, beside its shards. These stages write them, whichever comes first.
_OF_TOKENS: Final = (LOCK, "manifest.json", "manifest.json.tmp")
_STORE_TOKENS: Final = ("cache", "train")
# Files in the run's folder, by the stage that writes them; those of "" are written by every run.
_OF_RUNS: Final[Mapping[str, tuple[str, ...]]] = {
    "": (LOCK, "config.toml", STATUS, f"{STATUS}.partial"),
    "evaluate": (
        "metrics.json",
        *(f"{name}{end}" for name in ("report.md", "report.html") for end in ("", ".partial")),
    ),
}


def check_places(run: Run, todo: Collection[str]) -> None:
    """StageError where the stages `todo` could not write. Stages that are done may lie in folders that are closed."""
    for folder in _folders(run, todo):
        problem = why_not_writable(folder)
        if problem is not None:
            raise StageError(
                "Results cannot be written to this folder",
                where=folder,
                found=problem,
                fix="Choose another run.output (or cache.path), or make the folder writable.",
            )
    for file in _files(run, todo):
        refuse_folder(file)
    draft = run.folder / "draft"
    if "train" in todo and (draft.is_symlink() or (draft.exists() and not draft.is_dir())):
        raise StageError(
            "The finished draft cannot be written to this place",
            where=draft,
            found="a symbolic link" if draft.is_symlink() else "a file",
            expected="a folder of this run, or nothing",
            fix="Move what is there away, or choose another run.output.",
        )
    exports = run.stage_folder("export")
    if "export" in todo and exports.is_symlink():
        raise StageError(
            "Exports cannot be written to this place",
            where=exports,
            found="a symbolic link",
            expected="a folder of this run, or nothing",
            fix="Move the link away, or choose another run.output.",
        )


def _folders(run: Run, todo: Collection[str]) -> Iterator[Path]:
    yield run.folder
    yield from (run.stage_folder(stage) for stage in sorted(todo))
    if any(stage in todo for stage in _STORE_TOKENS):
        yield run.folder / TOKENS
    if "train" in todo:
        from deepspec_core.training.checkpoint import CHECKPOINTS

        yield run.stage_folder("train") / CHECKPOINTS


def _files(run: Run, todo: Collection[str]) -> Iterator[Path]:
    yield from (run.folder / name for stage in ("", *sorted(todo)) for name in _OF_RUNS.get(stage, ()))
    for stage in sorted(todo):
        yield from (run.stage_folder(stage) / name for name in (*_OF_EVERY_STAGE, *_OF_STAGES.get(stage, ())))
    if any(stage in todo for stage in _STORE_TOKENS):
        yield from (run.folder / TOKENS / name for name in _OF_TOKENS)
    if "evaluate" in todo:
        from deepspec_core.pipeline.evaluating import journal_files

        yield from journal_files(run)
