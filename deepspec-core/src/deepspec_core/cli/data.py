"""`deepspec data`: show a run's conversations, or prepare them for later runs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from deepspec_core.cli.options import no_plugin, overrides, run_file

if TYPE_CHECKING:
    from deepspec_core.pipeline.showing import Shown

# Drops beyond these are counted, not listed.
_LISTED = 10
# The counts of conversations that do not become exactly one complete sample, in words.
_WORDS = {
    "unusable": "rows with contents that are not supported, such as images or empty answers",
    "malformed": "rows that are damaged or hold no conversation",
    "refused": "refused by the chat template or incomplete after it, or not valid Unicode",
    "control_tokens": "with a control token of the chat template or a stop token of the target in their text",
    "no_answer": "without an answer",
    "too_short": "with too few supervised tokens",
    "duplicates": "duplicates",
    "renamed": "renamed, because another conversation has the same id",
    "mask_token": "with the draft's mask token among their tokens",
    "same_question": "with the same first question as an earlier one",
    "same_prompt": "with the same prompt as an earlier one, dropped",
    "truncated": "cut at the length limit",
    "split": "split into one sample for each answer, because the template rewrites earlier answers",
    "joined_start": "with an answer whose leading white space is in the header's last token, and is not trained on",
    "given_tokens": "with token ids of their own, used unchanged",
}


@click.group()
def data() -> None:
    """Look at a run's conversations, or prepare them."""


@data.command()
@run_file
@click.option("-n", "count", type=click.IntRange(min=1), default=3, show_default=True, help="How many samples.")
@click.option(
    "--split",
    type=click.Choice(["train", "held_out"]),
    default="train",
    show_default=True,
    help="What training reads, or the prompts held out for evaluation.",
)
@overrides
@no_plugin
def show(
    path: str, count: int, split: Literal["train", "held_out"], overrides: tuple[str, ...], blocked: tuple[str, ...]
) -> None:
    """Print samples with their supervised text marked, and the conversations that were dropped.

    Supervised text is green on a terminal, and between « and » elsewhere. Loads the tokenizer, but no weights.
    """
    from deepspec_core.config.load import load_run_file
    from deepspec_core.pipeline.run import Run
    from deepspec_core.pipeline.showing import view
    from deepspec_core.plugins.discovery import load_plugins

    plugins = load_plugins(blocked=blocked)
    run = Run(file=load_run_file(path, overrides=overrides, plugins=plugins), path=Path(path), plugins=plugins)
    dropped: list[str] = []
    seen = view(run, split, count, on_drop=lambda drop: dropped.append(f"{drop.id}: {drop.reason}"))
    click.echo(seen.origin)
    colour, number = sys.stdout.isatty(), 0
    for number, shown in enumerate(seen.shown, start=1):
        click.echo(f"\n{click.style(_heading(number, shown), bold=True)}\n{_text(shown, colour)}")
    click.echo("")
    if number < count:
        click.echo(f"{number or 'none'} of {count} shown: there are no more")
    for line in [*_listed("dropped", dropped), *_listed("not regenerated", list(seen.failures))]:
        click.echo(line)
    if split == "train":
        click.echo(_summary("read", seen.counts))


@data.command()
@run_file
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder for the conversations. Default: prepared/ in the run's output.",
)
@click.option("--force", is_flag=True, help="Replace other prepared conversations in that folder.")
@overrides
@no_plugin
def prepare(path: str, out: Path | None, force: bool, overrides: tuple[str, ...], blocked: tuple[str, ...]) -> None:
    """Write a run's conversations as the run uses them: cleaned, mixed, without duplicates, split into training and
    held-out. Needs no target.

    Other runs can read the folder: name it as the only source in data.sources. Its split is kept.
    """
    from deepspec_core.cli.messages import show_messages
    from deepspec_core.config.load import load_run_file
    from deepspec_core.pipeline.preparing import prepare as prepare_run
    from deepspec_core.pipeline.run import Run
    from deepspec_core.plugins.discovery import load_plugins

    show_messages()
    plugins = load_plugins(blocked=blocked)
    run = Run(file=load_run_file(path, overrides=overrides, plugins=plugins), path=Path(path), plugins=plugins)
    done = prepare_run(run, (out or run.folder / "prepared").absolute(), force=force)
    click.echo(f"{done.action}: {done.folder}")
    for split, counts in done.counts.items():
        click.echo(_summary(split.replace("_", "-"), counts))
    if done.bad_rows is not None:
        click.echo(f"rows that cannot be used are listed in {done.bad_rows}")


def _summary(what: str, counts: Counter[str]) -> str:
    met = [f"{counts[name]:,} {words}" for name, words in _WORDS.items() if counts[name]]
    read = f"{what} {counts['conversations']:,} conversations"
    return f"{read}: {'; '.join(met)}" if met else read


def _heading(number: int, shown: Shown) -> str:
    kind = "prompt" if shown.is_prompt else "sample"
    supervised = "" if shown.is_prompt else f", {shown.supervised:,} supervised"
    cut = ", cut at the length limit" if shown.cut else ""
    return f"--- {kind} {number}, id {shown.id}: {shown.tokens:,} tokens{supervised}{cut}"


def _text(shown: Shown, colour: bool) -> str:
    def marked(text: str) -> str:
        return click.style(text, fg="green") if colour else f"«{text}»"

    return "".join(marked(text) if supervised else text for text, supervised in shown.pieces)


def _listed(what: str, lines: list[str]) -> Iterator[str]:
    yield from (f"{what} {line}" for line in lines[:_LISTED])
    if len(lines) > _LISTED:
        yield f"{what}: {len(lines) - _LISTED:,} more"
