"""`deepspec config show|check RUN.toml`: the effective run file, or everything that is wrong with it."""

from __future__ import annotations

import click

from deepspec_core.cli.options import no_plugin, overrides, run_file
from deepspec_core.config.load import load_run_file
from deepspec_core.config.schema import RunFile
from deepspec_core.plugins.discovery import load_plugins


@click.group()
def config() -> None:
    """Show or check a run file."""


@config.command()
@run_file
@overrides
@no_plugin
def show(path: str, overrides: tuple[str, ...], blocked: tuple[str, ...]) -> None:
    """Print the effective run file, every default filled in. The output is a run file itself."""
    from deepspec_core.config.render import render

    click.echo(render(_load(path, overrides, blocked)), nl=False)


@config.command()
@run_file
@overrides
@no_plugin
def check(path: str, overrides: tuple[str, ...], blocked: tuple[str, ...]) -> None:
    """Report every error at once, each with its key, what was found and expected, and the nearest valid name."""
    _load(path, overrides, blocked)
    click.echo(f"{path}: no problems found")


def _load(path: str, overrides: tuple[str, ...], blocked: tuple[str, ...]) -> RunFile:
    return load_run_file(path, overrides=overrides, plugins=load_plugins(blocked=blocked))
