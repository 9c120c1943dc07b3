"""`deepspec calibrate RUN`: fit temperatures that make a draft's confidences match its acceptance rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deepspec_core.cli.options import FiniteRange, no_plugin
from deepspec_core.cli.run_folder import run_folder

if TYPE_CHECKING:
    from rich.table import Table

    from deepspec_core.pipeline.calibrating import Calibrated


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--task", "tasks", multiple=True, metavar="TASK", help="Fit on this task's rounds. Repeatable. Default: all tasks."
)
@click.option(
    "--temperature",
    type=FiniteRange(min=0),
    help="Fit on the rounds at this sampling temperature. Default: the highest evaluated.",
)
@no_plugin
def calibrate(run: str, tasks: tuple[str, ...], temperature: float | None, blocked: tuple[str, ...]) -> None:
    """Fit temperatures for a draft's confidences on the rounds of its evaluation.

    RUN is a run's folder or its run file. Writes calibration.json to the run's folder, and calibration.sglang.json, the
    same for SGLang. Calibration changes no output of the target. The column "left out" is the cross-validated error: on
    each half of the prompts, with temperatures fitted on the other half.
    """
    from rich.console import Console

    from deepspec_core.pipeline.calibrating import calibrate as fit
    from deepspec_core.plugins.discovery import load_plugins

    versions = load_plugins(blocked=blocked).versions()
    found = fit(run_folder(run, blocked), tasks=tasks, temperature=temperature, versions=versions)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(_table(found))
    if found.unseen:
        positions = ", ".join(map(str, found.unseen))
        click.echo(f"Warning: no round proposed a token at position {positions}: the temperature there is 1.", err=True)
    if found.fitted.at_the_edge:
        positions = ", ".join(map(str, found.fitted.at_the_edge))
        click.echo(
            f"Warning: the temperature at position {positions} is at the end of the grid. Confidences there hardly "
            "predict acceptance, or there are too few rounds.",
            err=True,
        )
    for path in found.written:
        click.echo(f"wrote {path}")


def _table(found: Calibrated) -> Table:
    from deepspec_core.evaluation.report import figure, table

    on, fitted = found.fitted_on, found.fitted
    before, after, left_out = fitted.before, fitted.after, fitted.after_left_out
    rows = []
    for k, position in enumerate(before.positions):
        out = None if left_out is None else left_out.positions[k].ece
        own = (fitted.temperatures[k], position.ece, after.positions[k].ece, out)
        briers = (position.brier, after.positions[k].brier)
        rows.append([str(k + 1), f"{position.rounds:,}", *map(figure, (*own, *briers))])
    whole = (before.ece, after.ece, None if left_out is None else left_out.ece, before.brier, after.brier)
    title = f"{on['rounds']:,} rounds of {on['samples']:,} samples at temperature {on['temperature']:g}"
    headings = ("position", "rounds", "temperature", "ECE before", "after", "left out", "Brier before", "after")
    return table(title, headings, [*rows, ["all", "", "", *map(figure, whole)]], left=("position",))
