"""`deepspec diagnose RUN`: for a draft that trains well and accepts badly, the first stage that drops, and why."""

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
@click.option("--target", metavar="MODEL", help="RUN is a checkpoint, and this its target. Needs --task.")
@click.option(
    "--task", "tasks", multiple=True, metavar="TASK", help="Ask these prompts, in place of evaluate.tasks. Repeatable."
)
@click.option("--samples", type=click.IntRange(min=4), default=48, show_default=True, help="Training samples read.")
@click.option("--prompts", type=click.IntRange(min=4), default=24, show_default=True, help="Prompts decoded.")
@click.option(
    "--rounds", type=click.IntRange(min=4), default=48, show_default=True, help="Rounds looked at one by one."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=8), default=128, show_default=True, help="Of one decoded answer."
)
@click.option(
    "--tolerance",
    type=FiniteRange(0, 1),
    default=0.1,
    show_default=True,
    help="A stage drops where it is surely lower, and by more than this share.",
)
@click.option("--served", metavar="FILE", help='A server\'s counts: {"drafts": 1200, "accepted": [900, 640]}.')
@click.option(
    "--server", metavar="URL", help="Ask this vLLM, llama.cpp or SGLang server, and read its own counts instead."
)
@click.option("--served-as", metavar="NAME", help="The server's name of the target, if it is another one.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the server's key.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON that is written, in place of the text.")
@click.option("--out", metavar="FILE", help=f"Where the JSON goes. Default: {RESULT} in the run's folder.")
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

    RUN is a run file, a run's folder, or with --target a checkpoint. The same figures are measured at every stage from
    training to decoding, and the first stage that drops is named with its cause. Evaluation is looked at as the run
    file has it now, with --set: nothing that changed since training is refused. The exit code is 0 whatever is found.
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
        raise click.UsageError("A checkpoint has no prompts of its own: give --task.")
    if server is not None and served is not None:
        raise click.UsageError("--server asks for what --served has in a file: give one of them.")
    if server is None and (served_as is not None or api_key_env is not None):
        raise click.UsageError("--served-as and --api-key-env go with --server.")
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
    title = "Right tokens by position, %, where all before them are right (recorded: whatever stands before them)"
    return table(title, headings, rows, left=("stage", "what it is", ""))
