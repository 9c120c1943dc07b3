"""`deepspec new KIND NAME`: a plugin package to begin with, installable and tested."""

from __future__ import annotations

from pathlib import Path

import click

from deepspec_core.scaffold.writing import KINDS


@click.command()
@click.argument("kind", metavar="KIND", type=click.Choice(list(KINDS)))
@click.argument("name", metavar="NAME")
@click.option("-o", "--output", "out", default=".", show_default=True, metavar="DIR", help="The folder to write into.")
@click.option("--for", "algorithm", metavar="TYPE", help="For an exporter: the draft type that it exports.")
def new(kind: str, name: str, out: str, algorithm: str | None) -> None:
    """Write a plugin package, deepspec-NAME.

    KIND is draft, loss, weighting, target, cache, task, exporter or command. The package works as written, and its
    tests run the conformance suite of its contract. Start editing from there. An existing folder is never overwritten.
    """
    from deepspec_core.cli.main import COMMANDS
    from deepspec_core.errors import ConfigError, nearest
    from deepspec_core.plugins.discovery import load_plugins
    from deepspec_core.scaffold.writing import write_package

    if algorithm is not None and kind != "exporter":
        raise ConfigError("--for applies to exporters only", where="--for", found=algorithm, fix="Leave it out.")
    registry = load_plugins().registry
    if kind == "exporter":
        installed = registry.trained_drafts()
        if algorithm is None and not installed:
            raise ConfigError("no draft type is installed that an exporter could write", fix="Install one first.")
        if algorithm is not None and algorithm not in installed:
            close = nearest(algorithm, installed)
            raise ConfigError(
                "no draft type of this name is trained",
                where="--for",
                found=algorithm,
                expected=f"one of {', '.join(installed)}",
                fix=f"write {close!r}" if close else None,
            )
        algorithm = algorithm or installed[0]
    taken = set(COMMANDS) if kind == "command" else set(registry.names(kind))
    folder = write_package(kind, name, Path(out), registry=registry, taken=taken, algorithm=algorithm or "")
    click.echo(f"wrote {folder}")
    click.echo(f"next: pip install -e '{folder}[test]'; pytest {folder}; deepspec plugins")
