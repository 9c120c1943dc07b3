"""A run as commands take it: its folder, or its run file. Knows no command."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_SAVED: Final = "config.toml"
_CHECKPOINT: Final = "draft/config.json"


def folder_of_saved(place: str) -> str:
    """The run's folder, if `place` is the run file that is saved in it beside the draft; else `place`.

    Paths in the saved file are relative to the place of the file that it was saved from.
    """
    from deepspec_core.disk import is_file

    path = Path(place)
    return str(path.parent) if path.name == _SAVED and is_file(path.parent / _CHECKPOINT) else place


def run_folder(place: str, blocked: tuple[str, ...]) -> Path:
    """The folder of a run's results, from itself or from its run file. ConfigError where the run file is mistaken."""
    path = Path(folder_of_saved(place))
    if path.is_dir() or path.suffix != ".toml":
        return path
    from deepspec_core.config.load import load_run_file
    from deepspec_core.pipeline.run import Run
    from deepspec_core.plugins.discovery import load_plugins

    plugins = load_plugins(blocked=blocked)
    return Run(file=load_run_file(path, plugins=plugins), path=path, plugins=plugins).folder
