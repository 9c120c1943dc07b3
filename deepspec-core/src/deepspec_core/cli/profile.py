"""`deepspec profile TARGET`: measure the target's steps per second, by batch size and tokens in the batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deepspec_core.cli.options import no_plugin
from deepspec_core.config.schema import DTYPES

if TYPE_CHECKING:
    from rich.table import Table

    from deepspec_core.decoding.profiling import Step

_FEWEST = 3


@click.command()
@click.argument("target", metavar="TARGET")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2, 4, 8, 16, 32),
    show_default=True,
    help="The number of concurrent requests. Repeatable.",
)
@click.option(
    "--draft-tokens",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    help="The most draft tokens of a request that one step verifies.",
)
@click.option(
    "--context", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of context before a step."
)
@click.option(
    "--repeats", type=click.IntRange(min=_FEWEST), default=15, show_default=True, help="Repeats of each measurement."
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32 on CPU, bfloat16 elsewhere.")
@click.option("--out", metavar="FILE", help="The file to write. Default: profile-NAME.json, after the target.")
@no_plugin
def profile(
    target: str,
    batch_sizes: tuple[int, ...],
    draft_tokens: int,
    context: int,
    repeats: int,
    dtype: str | None,
    out: str | None,
    blocked: tuple[str, ...],
) -> None:
    """Measure the steps per second of TARGET (a Hub id, a directory, or builtin:NAME) on this machine.

    A step is one forward pass that verifies the draft tokens of every request. The table is the input of `deepspec
    simulate`. It holds medians of repeated steps, interleaved over batch sizes. An existing file is never overwritten.
    """
    from rich.console import Console

    from deepspec_core.evaluation.cost_table import faster_with_more
    from deepspec_core.pipeline.profiling import Shapes
    from deepspec_core.pipeline.profiling import profile as measure
    from deepspec_core.plugins.discovery import load_plugins

    plugins = load_plugins(blocked=blocked)
    own = re.sub(r"[^\w.-]", "_", target.rpartition("/")[2].removeprefix("builtin:"))
    steps, written = measure(
        target,
        Shapes(batch_sizes=batch_sizes, draft_tokens=draft_tokens, context=context, repeats=repeats),
        dtype=dtype,
        out=Path(f"profile-{own}.json" if out is None else out),
        registry=plugins.registry,
        versions=plugins.versions(),
    )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(_table(steps, f"Steps a second of {target}, after {context} tokens of context"))
    if (noise := faster_with_more(steps)) is not None:
        click.echo(noise, err=True)
    for path in written:
        click.echo(f"wrote {path}")


def _table(steps: Sequence[Step], title: str) -> Table:
    from deepspec_core.evaluation.report import table

    widths = sorted({step.tokens // step.requests for step in steps})
    by_shape = {(step.requests, step.tokens // step.requests): step for step in steps}
    rows = [
        [str(size), *(f"{1 / by_shape[size, width].seconds:,.1f}" for width in widths)]
        for size in sorted({step.requests for step in steps})
    ]
    return table(title, ("requests", *(f"{width} tokens each" for width in widths)), rows, left=())
