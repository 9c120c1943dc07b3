"""Options that several commands share, so that they are spelled and explained alike."""

from __future__ import annotations

import math
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A FloatRange without `nan` and infinities, which lie within click's own."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; what is none fails as click's own."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{found} is no finite number.", param, ctx)
        return found


no_plugin = click.option(
    "--no-plugin",
    "blocked",
    multiple=True,
    metavar="NAME",
    help="Do not load a plugin, given by its name or its package's. Repeatable.",
)
overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set one key of the run file, as in train.lr=3e-4. Repeatable.",
)
run_file = click.argument("path", metavar="RUN.toml", type=click.Path(path_type=str))


def sampling(command: Any) -> Any:
    """The sampling options besides the temperature, and the stop strings."""
    for option in reversed(
        (
            click.option(
                "--top-p",
                type=click.FloatRange(0, 1, min_open=True),
                default=1.0,
                show_default=True,
                help="Draw from the smallest set of most probable tokens whose probabilities add up to this.",
            ),
            click.option(
                "--top-k",
                type=click.IntRange(min=0),
                default=0,
                show_default=True,
                help="Draw from this many most probable tokens; 0: all.",
            ),
            click.option(
                "--min-p",
                type=click.FloatRange(0, 1),
                default=0.0,
                show_default=True,
                help="Draw only tokens whose probability is at least this share of the greatest one; 0: all.",
            ),
            click.option(
                "--repetition-penalty",
                type=click.FloatRange(0.01, 100),
                default=1.0,
                show_default=True,
                help="Above 1, tokens that occurred already become less probable, also at temperature 0.",
            ),
            click.option("--stop", multiple=True, metavar="TEXT", help="A text that ends an answer. Repeatable."),
        )
    ):
        command = option(command)
    return command
