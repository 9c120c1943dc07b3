"""`deepspec compare RUN --with lookup,tree:16`: a run's draft beside baselines, on the same prompts."""

from __future__ import annotations

from pathlib import Path

import click

from deepspec_core.cli.messages import show_messages
from deepspec_core.cli.options import no_plugin, overrides


@click.command()
@click.argument("place", metavar="RUN")
@click.option(
    "--with",
    "names",
    multiple=True,
    required=True,
    metavar="DRAFT,...",
    help="Baselines: drafts that are not trained (TYPE, TYPE:VALUE or TYPE:key=value,...), or tree:N, the run's own "
    "draft with trees of N tokens. Repeatable.",
)
@click.option(
    "--beside",
    multiple=True,
    metavar="FOLDER",
    help="Include an existing evaluation, such as a server's (`deepspec evaluate --server`). Repeatable.",
)
@click.option("--force", type=click.Choice(["evaluate"]), help="Discard these evaluations first.")
@overrides
@no_plugin
def compare(
    place: str,
    names: tuple[str, ...],
    beside: tuple[str, ...],
    force: str | None,
    overrides: tuple[str, ...],
    blocked: tuple[str, ...],
) -> None:
    """Evaluate a run's draft and baselines on the same prompts, and put them into one table.

    RUN is a run file or a run's folder. The run's own evaluation is reused if it is finished. The baselines'
    evaluations, comparison.json, comparison.md and the page comparison.html are written to compare/ in the run's
    folder. The column "run's draft ahead by" is the difference of the accepted lengths on the same prompts, with a 95%
    interval.
    """
    from rich.console import Console

    from deepspec_core.config.load import load_run_file
    from deepspec_core.pipeline.comparing import compare_with
    from deepspec_core.pipeline.run_of_folder import run_file_of
    from deepspec_core.plugins.discovery import load_plugins
    from deepspec_core.untrained.named import listed

    show_messages()
    plugins = load_plugins(blocked=blocked)
    path = Path(place)
    if path.is_dir():
        file, path = run_file_of(path, overrides=overrides, plugins=plugins)
    else:
        file = load_run_file(path, overrides=overrides, plugins=plugins)
    drafts = [name for text in names for name in listed(text, plugins.registry)]
    found = compare_with(
        file,
        path,
        list(dict.fromkeys(drafts)),
        plugins=plugins,
        say=click.echo,
        beside=[Path(folder) for folder in dict.fromkeys(beside)],
        force=[] if force is None else [force],
    )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(found.terminal_table())
    for line in found.comparison.notes():
        click.echo(line)
    click.echo(f"comparison: {found.folder / 'comparison.md'}")
