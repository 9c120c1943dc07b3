"""`deepspec status RUN`: the state of a run, from another shell while it runs. Imports nothing heavy."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from deepspec_core.cli.options import no_plugin
from deepspec_core.cli.run_folder import run_folder

if TYPE_CHECKING:
    from deepspec_core.pipeline.run_status import RunStatus


@click.command()
@click.argument("place", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: one object.")
@no_plugin
def status(place: str, as_json: bool, blocked: tuple[str, ...]) -> None:
    """Show the state of a run: its stage, speed, time left, last evaluation and warnings.

    RUN is the run's folder or its run file. The command only reads, so it may be used at any time, from any machine
    that sees the folder.
    """
    from deepspec_core.pipeline.run_status import status_of

    found = status_of(run_folder(place, blocked))
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
        return
    for line in _lines(found):
        click.echo(_printable(line))


def _printable(text: str) -> str:
    """The text without control characters: files may hold anybody's text, and a terminal would obey them."""
    letters = (" " if letter.isspace() else letter for letter in text)
    return "".join("\ufffd" if unicodedata.category(letter).startswith("C") else letter for letter in letters)


def _lines(found: RunStatus) -> Iterator[str]:
    from deepspec_core.progress import duration

    yield f"{found.name} ({found.folder}): {found.said}"
    wide = max(map(len, found.stages), default=0)
    for name, (state, seconds) in found.stages.items():
        yield f"  {name:<{wide}}  {state}" + (f", {duration(seconds)}" if seconds else "")
        if name == found.stage and state == "running":
            yield from (f"  {'':<{wide}}  {line}" for line in _work(found))
    if found.training is not None and (found.stage != "train" or found.state == "dead"):
        yield f"last line of training: {_figures(found.training)}"
    for one in found.evaluation:
        length = "none" if one["acceptance_length"] is None else f"{one['acceptance_length']:.2f}"
        if "step" in one:
            yield f"held-out prompts at step {one['step']:,}: accepted length {length}"
        else:
            yield f"evaluated on {one['task']}, T = {one['temperature']:g}: accepted length {length}"
    if found.warnings_count:
        yield f"{found.warnings_count} warnings since the start; the newest:"
        for warning in found.warnings[-5:]:
            when = time.strftime("%H:%M:%S", time.localtime(warning["time"]))
            yield f"  {when} {warning['text']}"
    for remark in found.remarks:
        yield f"not shown: {remark}"


def _work(found: RunStatus) -> Iterator[str]:
    """The stage's present work, its speed, and the slowest rank."""
    from deepspec_core.progress import duration

    work = found.progress
    if work is None:
        yield f"no progress to show yet, after {duration(found.seconds_without_progress or 0)}"
        return
    of = "" if work["total"] is None else f" of {work['total']:,}"
    line = f"{work['what']}: {work['done']:,}{of} {work['unit']}, {work['rate']:.3g} {work['unit']}/s"
    if found.seconds_left is not None:
        line += f", {duration(found.seconds_left)} left"
    yield line
    if work["figures"]:
        yield ", ".join(
            value if isinstance(value, str) else f"{name} {value:.4g}" for name, value in work["figures"].items()
        )
    waited = found.seconds_without_progress or 0.0
    if waited > 60 and waited * work["rate"] > 3:
        yield f"no progress for {duration(waited)}"
    slow: dict[str, Any] | None = found.slowest
    if slow is not None and "seconds" in slow:
        yield f"slowest rank: {slow['rank']}, {slow['seconds']:.3g} s a step, the fastest {slow['fastest_seconds']:.3g}"
    elif slow is not None:
        yield f"slowest rank: {slow['rank']}, {slow['done']:,.0f} {work['unit']}; the fastest {slow['most_done']:,.0f}"


def _figures(line: dict[str, float]) -> str:
    from deepspec_core.training.metrics import at_a_glance

    shown = at_a_glance(line).items()
    return f"step {line['step']:,.0f}, " + ", ".join(
        value if isinstance(value, str) else f"{name} {value:.4g}" for name, value in shown
    )
