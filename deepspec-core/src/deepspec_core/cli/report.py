"""`deepspec report RUN...`: finished evaluations in one table, with what makes them incomparable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepspec_core.cli.options import no_plugin
from deepspec_core.cli.run_folder import run_folder
from deepspec_core.errors import StageError
from deepspec_core.evaluation.metrics_file import NAME as METRICS
from deepspec_core.evaluation.metrics_file import read_metrics

if TYPE_CHECKING:
    from deepspec_core.evaluation.comparison import Comparison, Run


@click.command()
@click.argument("places", metavar="RUN...", nargs=-1, required=True)
@click.option("--json", "form", flag_value="json", help="Machine-readable: one object.")
@click.option("--markdown", "form", flag_value="markdown", help="A Markdown page.")
@click.option("--latex", "form", flag_value="latex", help="A LaTeX table, with the package booktabs.")
@click.option("--html", metavar="FILE", help="Write a self-contained page there, with charts and sample answers.")
@click.option("--output", metavar="FILE", help="Write there instead (Markdown, if no other format is asked for).")
@no_plugin
def report(
    places: tuple[str, ...], form: str | None, html: str | None, output: str | None, blocked: tuple[str, ...]
) -> None:
    """Compare evaluated runs, given by their folders or their run files.

    Rows that cannot be compared with the first run (another target, other prompts, other settings) are marked.
    """
    from deepspec_core.evaluation.comparison import compare

    folders = [run_folder(place, blocked) for place in places]
    runs = _runs(folders)
    if html is not None:
        from deepspec_core.reporting.page import shown, write_page

        write_page(Path(html), [shown(folder, run) for folder, run in zip(folders, runs, strict=True)])
        click.echo(f"written to {html}", err=output is None and form is not None)
    comparison = compare(runs)
    if form == "json":
        _put(json.dumps(comparison.as_json(), indent=1) + "\n", output)
    elif form == "latex":
        _put(comparison.latex(), output)
    elif form == "markdown" or output is not None:
        _put(comparison.markdown(), output)
    elif html is None:
        _show(comparison)


def _runs(folders: Sequence[Path]) -> list[Run]:
    """Each run by its name; where two share one, by its folder."""
    from deepspec_core.evaluation.comparison import Run

    reports = [_read(folder) for folder in folders]
    names = [report["run"] for report in reports]
    return [
        Run(label=name if names.count(name) == 1 else str(folder), report=report)
        for name, folder, report in zip(names, folders, reports, strict=True)
    ]


def _read(folder: Path) -> Any:
    try:
        return read_metrics(folder / METRICS)
    except FileNotFoundError:
        raise StageError(
            "No evaluation there",
            where=folder,
            expected=f"a run's folder with {METRICS}, or its run file",
            fix="Run its evaluate stage first.",
        ) from None


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
