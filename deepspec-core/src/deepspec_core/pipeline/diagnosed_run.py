"""The run that a diagnosis examines: that of a run file, of a run's folder, or of a checkpoint with its target.

Knows how each is named and opened. Does not know what a diagnosis examines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attrs import evolve

from deepspec_core.checkpoints.opening import resolve_draft
from deepspec_core.checkpoints.published import read_draft_config, read_options
from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.config.schema import (
    DataOptions,
    DraftOptions,
    EvaluateOptions,
    RegenerateOptions,
    RunOptions,
    TargetOptions,
)
from deepspec_core.errors import CheckpointError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.run_of_folder import run_file_of
from deepspec_core.plugins.discovery import Plugins


def run_of(place: Path, *, overrides: Sequence[str], tasks: Sequence[str], plugins: Plugins) -> Run:
    """The run of a run file, or of a run's folder.

    Raises StageError if a folder's relative paths cannot be resolved.
    """
    if place.is_dir():
        file, path = run_file_of(place, overrides=overrides, plugins=plugins)
    else:
        file, path = load_run_file(place, overrides=tuple(overrides), plugins=plugins), place
    if tasks:
        file = evolve(file, evaluate=evolve(file.evaluate, tasks=tuple(tasks)))
    return Run(file=file, path=path, plugins=plugins)


def run_of_checkpoint(draft: str, *, target: str, tasks: Sequence[str], plugins: Plugins) -> Run:
    """The run that would evaluate a checkpoint. Raises CheckpointError if it is none."""
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
