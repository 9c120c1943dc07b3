"""`deepspec init MODEL --draft TYPE`: a complete, commented run file for a target."""

from __future__ import annotations

from pathlib import Path

import click

from deepspec_core.cli.options import no_plugin


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
    from deepspec_core.errors import ConfigError
    from deepspec_core.pipeline.starting import start_of
    from deepspec_core.plugins.discovery import load_plugins

    path = Path(out)
    exists = ConfigError("the run file exists already", where=path, fix="Choose another name with -o.")
    if path.exists():
        raise exists
    if not path.parent.is_dir():
        raise ConfigError("no such folder", where=path.parent, fix="Make it first, or choose another with -o.")
    plugins = load_plugins(blocked=blocked)
    asked = None if recipe is None else recipe == "recommended"
    start = start_of(model, draft_type, data, path.parent, plugins.registry, recommended=asked)
    text = starter(start)
    if start.recommended:
        check_written(text, plugins.registry.get("draft", draft_type), folder=path.parent, plugins=plugins)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise exists from None
    click.echo(f"wrote {path}{', with the recommended recipe (or: --recipe published)' if start.recommended else ''}")
    click.echo(f"next: deepspec config check {path}; deepspec data show {path}; deepspec run {path} --smoke")
