"""Options that several commands share, so that they are spelled and explained alike."""

from __future__ import annotations

import click

no_plugin = click.option(
    "--no-plugin",
    "blocked",
    multiple=True,
    metavar="NAME",
    help="Leave a plugin out, by its name or its package's. Repeatable.",
)
overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one key of the run file, as in train.lr=3e-4. Repeatable.",
)
run_file = click.argument("path", metavar="RUN.toml", type=click.Path(path_type=str))
