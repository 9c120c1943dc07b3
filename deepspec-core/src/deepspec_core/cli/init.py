"""`deepspec init MODEL --draft TYPE`: a complete, commented run file for a target."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deepspec_core.cli.options import no_plugin

if TYPE_CHECKING:
    from deepspec_core.errors import ConfigError


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--draft", "draft_type", required=True, metavar="TYPE", help="The draft's type; see `deepspec plugins`.")
@click.option("--data", metavar="PATH", help="JSON lines, a dataset on disk or on the Hub, or builtin:NAME.")
@click.option(
    "-o", "--output", "out", default="train.toml", show_default=True, metavar="FILE", help="The run file to write."
)
@click.option(
    "--recipe",
    type=click.Choice(["published", "recommended"]),
    help="The published settings, or settings that decoded better after the same training; the file cites the "
    "measurement.  [default: recommended, or published for a draft type without such settings]",
)
@no_plugin
def init(model: str, draft_type: str, data: str | None, out: str, recipe: str | None, blocked: tuple[str, ...]) -> None:
    """Write a run file that trains a draft for MODEL: a Hub id, a directory, or builtin:NAME.

    Reads the target's config and tokenizer, but no weights. The file has taps, mask token, sampling and sizes, each
    with an explanation, and estimates of the disk and memory that the run needs. An existing file is never overwritten.
    """
    from deepspec_core.config.recipe_check import check_written
    from deepspec_core.config.starter import starter
    from deepspec_core.pipeline.starting import start_of
    from deepspec_core.plugins.discovery import load_plugins

    path = Path(out)
    _refuse_place(path)
    _refuse_names(model, data)
    plugins = load_plugins(blocked=blocked)
    asked = None if recipe is None else recipe == "recommended"
    start = start_of(model, draft_type, data, path.parent, plugins.registry, recommended=asked)
    text = starter(start)
    spec = plugins.registry.get("draft", draft_type)
    check_written(text, spec, recommended=start.recommended, folder=path.parent, plugins=plugins)
    write_run_file(path, text)
    click.echo(f"wrote {path}{', with the recommended recipe (or: --recipe published)' if start.recommended else ''}")
    name = shlex.quote(str(path))
    click.echo(f"next: deepspec config check {name}; deepspec data show {name}; deepspec run {name} --smoke")


def _refuse_place(path: Path) -> None:
    """ConfigError if no new file can be written there."""
    from deepspec_core.config.paths import no_path
    from deepspec_core.disk import why_not_writable
    from deepspec_core.errors import ConfigError

    if not path.name:
        raise ConfigError("no name for the run file", where="-o", fix="Give one, such as -o train.toml.")
    if (problem := no_path("-o", path)) is not None:
        raise problem
    if os.path.lexists(path):
        raise _exists(path)
    if not path.parent.is_dir():
        raise ConfigError("no such folder", where=path.parent, fix="Make it first, or choose another with -o.")
    if (why := why_not_writable(path.parent)) is not None:
        raise ConfigError("the run file cannot be written", where=path, found=why, fix="Choose another folder with -o.")


def _refuse_names(model: str, data: str | None) -> None:
    """ConfigError for names that a run file, which is Unicode, cannot have. File systems take any bytes."""
    from deepspec_core.data.unicode_text import not_unicode, printable
    from deepspec_core.errors import ConfigError

    for what, given in (("MODEL", model), ("--data", data)):
        if given is not None and (why := not_unicode(given)) is not None:
            raise ConfigError("a run file cannot have this name", where=f"{what}: {printable(given)}", found=why)


def write_run_file(path: Path, text: str) -> None:
    """The whole file or none, and never over another one."""
    from deepspec_core.errors import ConfigError

    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        raise _exists(path) from None
    try:
        with file:
            file.write(text)
    except OSError as error:
        path.unlink()
        raise ConfigError(
            "the run file cannot be written", where=path, found=error.strerror, fix="Make room, or choose another -o."
        ) from error


def _exists(path: Path) -> ConfigError:
    from deepspec_core.errors import ConfigError

    return ConfigError("the run file exists already", where=path, fix="Choose another name with -o.")
