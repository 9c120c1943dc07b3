"""`deepspec report RUN...`: evaluations in one table, with what makes them incomparable, and the curves of training."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepspec_core.cli.options import no_plugin
from deepspec_core.cli.run_folder import run_folder
from deepspec_core.disk import why_not_writable
from deepspec_core.errors import ConfigError, StageError
from deepspec_core.evaluation.metrics_file import NAME as METRICS
from deepspec_core.evaluation.metrics_file import read_metrics

if TYPE_CHECKING:
    from deepspec_core.evaluation.comparison import Comparison, Run
    from deepspec_core.reporting.curves import Training


@click.command()
@click.argument("places", metavar="RUN...", nargs=-1, required=True)
@click.option("--json", "form", flag_value="json", help="Machine-readable: one object.")
@click.option("--markdown", "form", flag_value="markdown", help="A Markdown page.")
@click.option("--latex", "form", flag_value="latex", help="A LaTeX table, for the package booktabs.")
@click.option(
    "--html", metavar="FILE", help="Write a self-contained page to FILE: charts, curves of training, answers."
)
@click.option("--png", metavar="FILE", help="Write the curves of training to FILE as one picture.")
@click.option("--output", metavar="FILE", help="Write the table to FILE (as Markdown, if no format is given).")
@no_plugin
def report(
    places: tuple[str, ...],
    form: str | None,
    html: str | None,
    png: str | None,
    output: str | None,
    blocked: tuple[str, ...],
) -> None:
    """Compare the evaluations and the curves of training of runs. RUN is a run's folder or its run file.

    Rows that cannot be compared with the first run (another target, other prompts, other settings) are marked. For a
    single trained run, the command writes report.html and training.png into its folder, unless options ask for other
    output.
    """
    from deepspec_core.evaluation.comparison import compare
    from deepspec_core.reporting.curves import read_training

    for place in filter(None, (html, png, output)):
        _make_room(Path(place))
    folders = [run_folder(place, blocked) for place in places]
    found = _runs(folders)
    trained = [one for folder, (label, _) in zip(folders, found, strict=True) if (one := read_training(folder, label))]
    for folder, (label, run) in zip(folders, found, strict=True):
        if run is None and all(one.label != label for one in trained):
            raise StageError(
                "There is nothing to report in this folder",
                where=folder,
                expected=f"a run's folder with {METRICS} or curves in train/metrics.jsonl, or its run file",
                fix="Run its train or evaluate stage first.",
            )
    evaluated = [run for _, run in found if run is not None]
    beside = len(folders) == 1 and bool(trained) and not (form or html or png or output)
    if not evaluated and (form or output or not (html or png or beside)):
        raise StageError(
            "There is no evaluation in this folder, so there is no table",
            where=folders[0],
            expected=f"a run's folder with {METRICS}, or its run file",
            fix="Run its evaluate stage first, or ask for the curves of training with --html or --png.",
        )
    if html is not None or png is not None:
        _draw(folders, found, trained, html, png, quiet=output is None and form is not None)
    if evaluated:
        comparison = compare(evaluated)
        if form == "json":
            _put(json.dumps(comparison.as_json(), indent=1) + "\n", output)
        elif form == "latex":
            _put(comparison.latex(), output)
        elif form == "markdown" or output is not None:
            _put(comparison.markdown(), output)
        elif html is None and png is None:
            _show(comparison)
    if beside:
        _draw_beside(folders[0], found, trained)


def _make_room(path: Path) -> None:
    """The folder of a file that was asked for. ConfigError where the file cannot be put there."""
    problem = f"{path} is a folder" if path.is_dir() else why_not_writable(path.parent)
    if problem is not None:
        raise ConfigError("the report cannot be written there", where=path, found=problem)
    path.parent.mkdir(parents=True, exist_ok=True)


def _draw(
    folders: Sequence[Path],
    found: Sequence[tuple[str, Run | None]],
    trained: Sequence[Training],
    html: str | None,
    png: str | None,
    *,
    quiet: bool = False,
) -> None:
    from deepspec_core.reporting.page import shown, shown_training, write_page
    from deepspec_core.reporting.training import write_picture

    if png is not None and not trained:
        raise StageError(
            "There are no curves of training in this folder",
            where=folders[0],
            expected="a run's folder with train/metrics.jsonl",
        )
    if html is not None:
        pages = [
            shown_training(folder, label) if run is None else shown(folder, run)
            for folder, (label, run) in zip(folders, found, strict=True)
        ]
        write_page(Path(html), pages, partial=f"{os.getpid()}")
        click.echo(f"written to {html}", err=quiet)
    if png is not None:
        write_picture(Path(png), trained)
        click.echo(f"written to {png}", err=quiet)


def _draw_beside(folder: Path, found: Sequence[tuple[str, Run | None]], trained: Sequence[Training]) -> None:
    """Draw into the run's folder. The user did not ask for it, so a problem is reported but is not an error."""
    from deepspec_core.reporting.page import NAME as PAGE
    from deepspec_core.reporting.training import NAME as PICTURE

    try:
        _draw([folder], found, trained, str(folder / PAGE), str(folder / PICTURE))
    except (ConfigError, OSError) as error:
        click.echo(f"curves of training were not drawn: {error}", err=True)


def _runs(folders: Sequence[Path]) -> list[tuple[str, Run | None]]:
    """Each run's label and evaluation. The label is the run's name, or its folder if two runs have the same name."""
    from deepspec_core.evaluation.comparison import Run

    reports = [_read(folder) for folder in folders]
    names = [
        report["run"] if report is not None else _name(folder) for folder, report in zip(folders, reports, strict=True)
    ]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    return [
        (label, None if report is None else Run(label=label, report=report))
        for label, report in zip(labels, reports, strict=True)
    ]


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        return read_metrics(folder / METRICS)
    except FileNotFoundError:
        return None


def _name(folder: Path) -> str:
    """The run's name in its run file; else the folder's name."""
    try:
        return str(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["run"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.resolve().name


def _put(text: str, output: str | None) -> None:
    if output is None:
        click.echo(text, nl=False)
    else:
        Path(output).write_text(text, encoding="utf-8")
        click.echo(f"written to {output}")


def _show(comparison: Comparison) -> None:
    from rich.console import Console

    # Wide enough for the table also where the output is a file.
    console = Console(width=None if Console().is_terminal else 160)
    console.print(comparison.terminal_table())
    for line in comparison.notes():
        click.echo(line)
