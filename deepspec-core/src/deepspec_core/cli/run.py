"""`deepspec run` and `deepspec-run`: the stages of a run file, in order."""

from __future__ import annotations

from pathlib import Path

import click

from deepspec_core.cli.messages import show_messages
from deepspec_core.cli.options import no_plugin, overrides, run_file

ARGUMENTS = "deepspec_core.run_arguments"


def _names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if value else ()


class _Verbatim(click.Command):
    """Keeps the command's arguments, with which worker processes are started."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


@click.command(cls=_Verbatim)
@run_file
@click.option("--stages", callback=_names, metavar="STAGE,...", help="Run only these stages of the run file.")
@overrides
@no_plugin
@click.option(
    "--force", callback=_names, metavar="STAGE", help="Discard a stage's results, and the results that depend on them."
)
@click.option("--dry-run", is_flag=True, help="Show which stages would run, and stop.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes on this machine. Default: one per accelerator.")
@click.option("--smoke", is_flag=True, help="Run every stage on 16 samples and 10 steps, in a separate folder.")
def run(
    path: str,
    stages: tuple[str, ...],
    overrides: tuple[str, ...],
    blocked: tuple[str, ...],
    force: tuple[str, ...],
    dry_run: bool,
    workers: int | None,
    smoke: bool,
) -> int | None:
    """Run the stages of a run file.

    Finished stages are skipped and interrupted ones resume. If a setting changed after a stage had results, the command
    stops with an error.
    """
    from deepspec_core.config.load import load_run_file
    from deepspec_core.pipeline import stages as pipeline
    from deepspec_core.pipeline import workers as processes
    from deepspec_core.pipeline.checking import check_before
    from deepspec_core.pipeline.local_workers import start, started_here, stop_with_starter
    from deepspec_core.pipeline.run import Run
    from deepspec_core.pipeline.running import begin, do, join
    from deepspec_core.pipeline.smoke import smoke as made_small
    from deepspec_core.plugins.discovery import load_plugins

    show_messages()
    stop_with_starter()
    plugins = load_plugins(blocked=blocked)
    file = load_run_file(path, overrides=overrides, plugins=plugins)
    the_run = Run(file=made_small(file) if smoke else file, path=Path(path), plugins=plugins, smoke=smoke)
    steps = pipeline.plan(the_run, only=stages, force=force)
    if dry_run:
        from deepspec_core.pipeline.preview import preview

        for line in preview(the_run, steps):
            click.echo(line)
        # A dry run makes the same checks as a run: the plan is shown first, then any error that would stop the run.
        check_before(the_run, steps, may_write=False)
        return None
    count = 1
    if not processes.launched() and any(step.stage.shared and step.action != "skip" for step in steps):
        count = (processes.visible_devices() if workers is None else workers) or 1
    if not started_here():
        # Workers that this command starts itself need not look again.
        begin(
            the_run,
            steps,
            say=click.echo if processes.rank() == 0 else _nothing,
            processes=max(count, processes.on_this_machine()),
        )
    if count > 1:
        return start(count, ["run", *click.get_current_context().meta[ARGUMENTS]])
    if processes.rank() > 0:
        join(the_run, steps)
        return None
    do(the_run, steps, only=stages, force=force, say=click.echo)
    if all(step.action == "skip" for step in steps):
        click.echo(f"nothing to do: every stage is complete in {the_run.folder}")
    show_report(the_run.folder)
    return None


def _nothing(_text: str) -> None:
    """Say nothing: only the first process reports."""


def show_report(folder: Path) -> None:
    """Print the table of a finished evaluation, and the paths of its reports."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        return
    from rich.console import Console

    from deepspec_core.evaluation.metrics_file import read_metrics
    from deepspec_core.evaluation.report import terminal_table

    # Wide enough for the table also where the output is a file.
    console = Console(width=None if Console().is_terminal else 160)
    console.print(terminal_table(read_metrics(metrics)))
    written = [folder / name for name in ("report.md", "report.html") if (folder / name).exists()]
    click.echo(f"report: {', '.join(map(str, written))}")
