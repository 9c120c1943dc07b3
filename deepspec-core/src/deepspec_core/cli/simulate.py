"""`deepspec simulate RUN --profile FILE`: total throughput and speed per user, by verification policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deepspec_core.cli.options import FiniteRange, no_plugin
from deepspec_core.cli.run_folder import run_folder

if TYPE_CHECKING:
    from rich.table import Table

    from deepspec_core.evaluation.simulation import Outcome
    from deepspec_core.pipeline.simulating import Simulation

RESULT = "simulation.json"


@click.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--profile", "profile", required=True, metavar="FILE", help="The cost table that `deepspec profile` wrote."
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    multiple=True,
    help="The number of concurrent requests. Repeatable. Default: all numbers in the cost table.",
)
@click.option(
    "--threshold",
    "thresholds",
    type=FiniteRange(0, 1),
    multiple=True,
    default=(0.3, 0.5, 0.7),
    show_default=True,
    help="Static confidence thresholds. Repeatable.",
)
@click.option(
    "--task", "tasks", multiple=True, metavar="TASK", help="Replay the rounds of this task. Repeatable. Default: all."
)
@click.option(
    "--temperature",
    type=FiniteRange(min=0),
    help="Replay rounds at this temperature. Default: the highest evaluated.",
)
@click.option("--calibration", metavar="FILE", help="The file that `deepspec calibrate` wrote for this draft.")
@click.option(
    "--draft-ms",
    type=FiniteRange(0, 1e9),
    default=0.0,
    show_default=True,
    help="Milliseconds that the draft takes in each step.",
)
@click.option(
    "--out",
    metavar="FILE",
    help=f"The file to write; the picture is written beside it. Default: {RESULT} in the run's folder.",
)
@no_plugin
def simulate(
    run: str,
    profile: str,
    requests: tuple[int, ...],
    thresholds: tuple[float, ...],
    tasks: tuple[str, ...],
    temperature: float | None,
    calibration: str | None,
    draft_ms: float,
    out: str | None,
    blocked: tuple[str, ...],
) -> None:
    """Replay the rounds of an evaluation at concurrent requests under a cost table.

    Compares no speculation, fixed numbers of verified tokens, static thresholds, the hardware-aware scheduler and its
    asynchronous form, and an oracle that knows what will be accepted. RUN is a run's folder or its run file. No model
    is loaded. The table and the picture beside the file show only the best fixed number and the best threshold; the
    file has all of them.
    """
    from rich.console import Console

    from deepspec_core.disk import full_disk_is_an_error
    from deepspec_core.evaluation.sealed_json import write_json
    from deepspec_core.pipeline.simulating import simulate as replay

    folder = run_folder(run, blocked)
    place = folder / RESULT if out is None else Path(out)
    drawn = place.with_suffix(".svg")
    _check_place(place, drawn)
    found = replay(
        folder,
        Path(profile),
        requests=requests,
        thresholds=thresholds,
        tasks=tasks,
        temperature=temperature,
        calibration=None if calibration is None else Path(calibration),
        draft_seconds=draft_ms / 1000,
    )
    with full_disk_is_an_error(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, found.as_json())
    console = Console(width=None if Console().is_terminal else 160)
    console.print(_table(found.outcomes))
    if not found.confidences:
        click.echo("This draft gives no confidences: thresholds and schedulers are left out.")
    if found.made_from["calibration_fitted_here"]:
        click.echo(
            "The calibration was fitted on the prompts of these rounds: thresholds and schedulers look better here "
            "than on other prompts. To avoid this, fit on another task: deepspec calibrate RUN --task TASK",
            err=True,
        )
    if found.noise is not None:
        click.echo(found.noise, err=True)
    if draft_ms == 0:
        click.echo("The draft's time is not counted; set it with --draft-ms.")
    click.echo(f"wrote {place}")
    with full_disk_is_an_error(place.parent):
        _draw(found, drawn)


def _check_place(place: Path, drawn: Path) -> None:
    """ConfigError where the result or its picture cannot be written, or would replace a file that is none."""
    from deepspec_core.disk import why_not_writable
    from deepspec_core.errors import ConfigError
    from deepspec_core.pipeline.simulating import is_simulation
    from deepspec_core.reporting.simulated import is_picture

    if (problem := why_not_writable(place.parent)) is not None:
        raise ConfigError("the result cannot be written to this place", where=place, found=problem)
    for path, known in ((place, is_simulation), (drawn, is_picture)):
        if path.exists() and not known(path):
            raise ConfigError(
                "the file exists already, and is not the result of a simulation",
                where=path,
                expected="a file that does not exist, or the result of an earlier simulation, which is replaced",
                fix="Choose another with --out.",
            )
    if place == drawn:
        raise ConfigError("the picture of the result has this name", where=place, fix="Name a .json file with --out.")


def _draw(found: Simulation, path: Path) -> None:
    """Beside the result. Without matplotlib there is none, which is said."""
    from deepspec_core.errors import ConfigError
    from deepspec_core.reporting.simulated import picture

    try:
        drawn = picture(found.outcomes)
    except ConfigError as error:
        path.unlink(missing_ok=True)
        click.echo(f"no picture is drawn: {error}", err=True)
        return
    path.write_text(drawn, encoding="utf-8")
    click.echo(f"wrote {path}")


def _table(outcomes: Sequence[Outcome]) -> Table:
    from deepspec_core.evaluation.report import table
    from deepspec_core.evaluation.simulation import best_of_kinds

    plain = {one.requests: one.tokens_per_second for one in outcomes if one.policy == "none"}
    rows = [_row(one, plain[one.requests]) for one in best_of_kinds(outcomes)]
    headings = ("requests", "policy", "tok/s", "tok/s a user", "speed-up", "tokens a step", "verified a step")
    return table("Simulated throughput", headings, rows, left=("policy",))


def _row(outcome: Outcome, plain: float) -> list[str]:
    return [
        str(outcome.requests),
        outcome.policy,
        f"{outcome.tokens_per_second:,.1f}",
        f"{outcome.tokens_per_second_per_user:,.1f}",
        f"{outcome.tokens_per_second / plain:.2f}x",
        f"{outcome.tokens_per_step:.2f}",
        f"{outcome.verified_per_step:.2f}",
    ]
