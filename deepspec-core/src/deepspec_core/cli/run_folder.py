"""A run as commands take it: its folder, or its run file. Knows no command."""

from __future__ import annotations

from pathlib import Path


def run_folder(place: str, blocked: tuple[str, ...]) -> Path:
    """The folder of a run's results, from itself or from its run file. ConfigError where the run file is mistaken."""
    path = Path(place)
    if path.is_dir() or path.suffix != ".toml":
        return path
    from deepspec_core.config.load import load_run_file
    from deepspec_core.pipeline.run import Run
    from deepspec_core.plugins.discovery import load_plugins

    plugins = load_plugins(blocked=blocked)
    return Run(file=load_run_file(path, plugins=plugins), path=path, plugins=plugins).folder
