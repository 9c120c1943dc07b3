"""Opens the run whose results are in a folder, from the run file that is saved there.

Knows where relative paths of the saved file start, and which keys hold paths. Opens no file that they name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from attrs import asdict, evolve

from deepspec_core.config.draft_start import TARGET_STARTS
from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.config.run_file_place import run_file_folder
from deepspec_core.config.schema import ROW_FILES
from deepspec_core.errors import StageError
from deepspec_core.evaluation.tasks import task_file
from deepspec_core.plugins.discovery import Plugins
from deepspec_core.targets.opening import is_relative

SAVED: Final = "config.toml"


def run_file_of(folder: Path, *, overrides: Sequence[str] = (), plugins: Plugins) -> tuple[RunFile, Path]:
    """The run file of a run's folder, and the path at which a `pipeline.run.Run` of it finds its files.

    Its `run.output` is this folder. Raises StageError if the folder holds no run, and where a path of the file is
    relative and the folder does not say where the run file lay.
    """
    saved = folder / SAVED
    if not saved.is_file():
        raise StageError(
            "There is no run in this folder",
            where=folder,
            expected=f"a run file, or a run's folder with {SAVED}; with --target, a checkpoint",
        )
    output = load_run_file(saved, plugins=plugins).run.output
    file = load_run_file(saved, overrides=tuple(overrides), plugins=plugins)
    base = run_file_folder(folder, output)
    if base is not None:
        return file, base / SAVED
    if relative := [f"{key} = {path}" for key, path in _paths(file) if not Path(path).expanduser().is_absolute()]:
        raise StageError(
            "The place of the run file is not known, and the run has paths relative to it",
            where=saved,
            found=f"{', '.join(relative)}; run.output = {output}",
            fix="Name the run file in place of the folder.",
        )
    return evolve(file, run=evolve(file.run, output=str(folder.resolve()))), saved


def _paths(file: RunFile) -> Iterator[tuple[str, str]]:
    """What the file names that can only be a path: no builtin, and no Hub id."""
    evaluate, init = file.evaluate, file.draft.init
    tables = {} if file.draft.options is None else asdict(file.draft.options, recurse=False)
    named = {
        "target.model": file.target.model,
        "evaluate.draft": evaluate.draft,
        "draft.init": None if init in TARGET_STARTS else init,
        **{f"draft.{key}": value for key, value in tables.items() if isinstance(value, str)},
        **{f"data.sources[{i}]": one.path for i, one in enumerate(file.data.sources)},
    }
    for key, name in named.items():
        if name and (is_relative(name) or name.endswith(ROW_FILES)):
            yield key, name
    files = {
        "target.chat_template": file.target.chat_template,
        "cache.path": file.cache.path,
        "features.exchange": file.features.exchange,
        "evaluate.calibration": evaluate.calibration,
        "evaluate.scheduler.cost_table": None if evaluate.scheduler is None else evaluate.scheduler.cost_table,
        **{f"evaluate.tasks[{i}]": task_file(task) for i, task in enumerate(evaluate.tasks)},
    }
    yield from ((key, path) for key, path in files.items() if path is not None)
