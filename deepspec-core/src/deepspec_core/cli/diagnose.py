"""`deepspec diagnose RUN`: find the stage between training and serving at which a draft loses acceptance, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deepspec_core.cli.messages import show_messages
from deepspec_core.cli.options import FiniteRange, no_plugin, overrides

if TYPE_CHECKING:
    from rich.table import Table

    from deepspec_core.diagnosis.finding import Diagnosis

RESULT = "diagnosis.json"


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--target", metavar="MODEL", help="The target, if RUN is a checkpoint. Needs --task.")
@click.option(
    "--task", "tasks", multiple=True, metavar="TASK", help="Use this task in place of evaluate.tasks. Repeatable."
)
@click.option(
    "--samples",
    type=click.IntRange(min=4),
    default=48,
    show_default=True,
    help="The number of training samples read.",
)
@click.option(
    "--prompts", type=click.IntRange(min=4), default=24, show_default=True, help="The number of prompts to decode."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=4),
    default=48,
    show_default=True,
    help="The number of rounds examined singly.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=8),
    default=128,
    show_default=True,
    help="The most new tokens of one decoded answer.",
)
@click.option(
    "--tolerance",
    type=FiniteRange(0, 1),
    default=0.1,
    show_default=True,
    help="A stage counts as a drop if its figure is significantly lower, by more than this share.",
)
@click.option("--served", metavar="FILE", help='A server\'s counts: {"drafts": 1200, "accepted": [900, 640]}.')
@click.option(
    "--server",
    metavar="URL",
    help="Let this vLLM, llama.cpp or SGLang server answer the prompts, and read its counts, in place of --served.",
)
@click.option("--served-as", metavar="NAME", help="The target's model name on the server, if it differs.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the server's API key.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON in place of the text.")
@click.option("--out", metavar="FILE", help=f"The JSON file to write. Default: {RESULT} in the run's folder.")
@overrides
@no_plugin
def diagnose(
    run: str,
    target: str | None,
    tasks: tuple[str, ...],
    samples: int,
    prompts: int,
    rounds: int,
    max_new_tokens: int,
    tolerance: float,
    served: str | None,
    server: str | None,
    served_as: str | None,
    api_key_env: str | None,
    as_json: bool,
    out: str | None,
    overrides: tuple[str, ...],
    blocked: tuple[str, ...],
) -> None:
    """Find where a draft that trains well loses its acceptance, and say why.

    RUN is a run file, a run's folder, or, with --target, a checkpoint. The command measures the same figures at every
    stage from training to decoding, and reports the first stage at which they drop, with the cause. It evaluates with
    the run file's present settings and --set, also if they changed since training. The exit code is 0 whatever the
    diagnosis is.
    """
    from deepspec_core.disk import full_disk_is_an_error, why_not_writable
    from deepspec_core.errors import ConfigError
    from deepspec_core.evaluation.sealed_json import write_json
    from deepspec_core.pipeline.diagnosed_run import run_of, run_of_checkpoint
    from deepspec_core.pipeline.diagnosed_server import Asked
    from deepspec_core.pipeline.diagnosing import Extent
    from deepspec_core.pipeline.diagnosing import diagnose as measure
    from deepspec_core.plugins.discovery import load_plugins

    if target is not None and not tasks:
        raise click.UsageError("A checkpoint has no prompts: give --task.")
    if server is not None and served is not None:
        raise click.UsageError("--server and --served both give a server's counts: give only one of them.")
    if server is None and (served_as is not None or api_key_env is not None):
        raise click.UsageError("--served-as and --api-key-env need --server.")
    show_messages()
    plugins = load_plugins(blocked=blocked)
    if target is None:
        looked_at = run_of(Path(run), overrides=overrides, tasks=tasks, plugins=plugins)
        place = looked_at.folder / RESULT if out is None else Path(out)
    else:
        looked_at = run_of_checkpoint(run, target=target, tasks=tasks, plugins=plugins)
        place = Path(RESULT if out is None else out)
    if (problem := why_not_writable(place.parent)) is not None:
        raise ConfigError("the result cannot be written there", where=place, found=problem)
    found = measure(
        looked_at,
        Extent(samples=samples, prompts=prompts, rounds=rounds, max_new_tokens=max_new_tokens),
        tolerance=tolerance,
        served=None if served is None else Path(served),
        server=None if server is None else Asked(address=server, served_as=served_as, api_key_env=api_key_env),
        say=lambda text: click.echo(f"diagnose: {text}", err=True),
    )
    with full_disk_is_an_error(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, found.as_json())
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
        return
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 160)
    console.print(_table(found))
    for name, why in found.not_measured.items():
        click.echo(f"not measured: {name}: {why}")
    for sentence in found.sentences():
        click.echo(sentence)
    click.echo(f"wrote {place}")


def _table(found: Diagnosis) -> Table:
    from deepspec_core.diagnosis.finding import STAGES
    from deepspec_core.evaluation.report import table

    size = max((len(stage.shares) for stage in found.stages), default=0)
    rows = []
    for stage in found.stages:
        figures = list(stage.conditional or stage.shares)
        cells = ["-" if one is None else f"{100 * one:.0f}" for one in [*figures, *[None] * (size - len(figures))]]
        length = "-" if stage.accepted is None else f"{stage.accepted:.2f}"
        interval = "" if stage.interval is None else f" ({stage.interval[0]:.2f}-{stage.interval[1]:.2f})"
        mark = "drops" if stage.drops else ""
        rows.append([stage.name, STAGES[stage.name], *cells, length + interval, str(stage.blocks or "-"), mark])
    headings = ("stage", "what it is", *(str(k + 1) for k in range(size)), "accepted a round", "blocks", "")
    title = "% of tokens that are right, by position, given that all before them are right (recorded: in any case)"
    return table(title, headings, rows, left=("stage", "what it is", ""))
