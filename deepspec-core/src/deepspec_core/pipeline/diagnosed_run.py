"""The run that a diagnosis looks at: of a run file, of a run's folder, or of a checkpoint with its target.

Knows how each is named and opened. Does not know what is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import evolve

from deepspec_core.checkpoints.opening import resolve_draft
from deepspec_core.checkpoints.published import read_draft_config, read_options
from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.config.run_file_place import run_file_folder
from deepspec_core.config.schema import (
    DataOptions,
    DraftOptions,
    EvaluateOptions,
    RegenerateOptions,
    RunOptions,
    TargetOptions,
)
from deepspec_core.errors import CheckpointError, StageError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import Plugins

_SAVED = "config.toml"


def run_of(place: Path, *, overrides: Sequence[str], tasks: Sequence[str], plugins: Plugins) -> Run:
    """The run of a run file, or of a run's folder. StageError where a folder does not say where its run file lay."""
    path = _file_of(place, plugins) if place.is_dir() else place
    file = load_run_file(place / _SAVED if place.is_dir() else place, overrides=tuple(overrides), plugins=plugins)
    if tasks:
        file = evolve(file, evaluate=evolve(file.evaluate, tasks=tuple(tasks)))
    return Run(file=file, path=path, plugins=plugins)


def _file_of(folder: Path, plugins: Plugins) -> Path:
    """Where the run file of a folder's saved one lay, as far as relative paths go."""
    saved = folder / _SAVED
    if not saved.is_file():
        raise StageError(
            "No run there",
            where=folder,
            expected=f"a run file, or a run's folder with {_SAVED}; with --target, a checkpoint",
        )
    output = load_run_file(saved, plugins=plugins).run.output
    if (base := run_file_folder(folder, output)) is None:
        raise StageError(
            "The folder does not say where its run file lay, and paths start there",
            where=saved,
            found=f"run.output = {output}",
            fix="Name the run file in place of the folder.",
        )
    return base / _SAVED


def run_of_checkpoint(draft: str, *, target: str, tasks: Sequence[str], plugins: Plugins) -> Run:
    """The run that would evaluate a checkpoint. CheckpointError where it is none."""
    folder = resolve_draft(draft, base=Path())
    algorithm, options, taps = read_options(folder, plugins.registry)
    try:
        layer = LayerOptions(intermediate_size=read_draft_config(folder).get("intermediate_size"))
    except (TypeError, ValueError) as error:
        raise CheckpointError("config.json cannot be used", where=folder, found=error) from None
    file = RunFile(
        run=RunOptions(name="diagnosis", output=".", stages=("evaluate",)),
        target=TargetOptions(model=target, layers=taps),
        data=DataOptions(sources=()),
        draft=DraftOptions(type=algorithm, options=options, layer=layer),
        regenerate=RegenerateOptions(),
        evaluate=EvaluateOptions(tasks=tuple(tasks), draft=draft),
    )
    return Run(file=file, path=Path("command line"), plugins=plugins)
