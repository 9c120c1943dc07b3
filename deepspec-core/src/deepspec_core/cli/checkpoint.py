"""`deepspec checkpoint show DIR_OR_HUB_ID`: the facts of a draft checkpoint, and whether its weights are complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepspec_core.cli.options import no_plugin

if TYPE_CHECKING:
    from deepspec_core.checkpoints.inspection import DraftFacts

UNFIT = 2


@click.group()
def checkpoint() -> None:
    """Look at a draft checkpoint."""


@checkpoint.command()
@click.argument("name", metavar="DIR_OR_HUB_ID")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: one object.")
@no_plugin
def show(name: str, as_json: bool, blocked: tuple[str, ...]) -> int:
    """Print a checkpoint's algorithm, family, taps, options, parameters, and the weights that do not fit.

    No target is loaded. The exit code is 2 if weights are missing, unexpected, of another shape or not floating-point
    numbers.
    """
    from deepspec_core.checkpoints.inspection import inspect_draft
    from deepspec_core.checkpoints.opening import resolve_draft
    from deepspec_core.plugins.discovery import load_plugins

    directory = resolve_draft(name, base=Path())
    facts = inspect_draft(directory, registry=load_plugins(blocked=blocked).registry)
    if as_json:
        click.echo(json.dumps({"checkpoint": name, **facts.as_json()}, indent=2, ensure_ascii=False))
    else:
        for line in _lines(name, facts):
            click.echo(line)
    return UNFIT if facts.differences else 0


def _lines(name: str, facts: DraftFacts) -> Iterator[str]:
    said, sizes = facts.description, facts.parameters
    adapter = "" if facts.adapter == facts.family else f", adapter {facts.adapter}"
    rows = [
        ("algorithm", f"{said.algorithm} ({said.class_name})"),
        ("family", f"{facts.family}{adapter}"),
        ("target", f"{facts.num_target_layers} layers, hidden {facts.hidden_size}, vocabulary {facts.vocab_size:,}"),
        ("taps", " ".join(map(str, said.taps)) or "none"),
        ("proposes", f"at most {said.max_tokens} tokens a round"),
        ("sees", "the whole context" if said.window is None else f"the {said.window} latest positions"),
        *(("options" if index == 0 else "", text) for index, text in enumerate(_options(facts.options))),
        ("parameters", f"{sizes.trained:,} trained, {sizes.frozen:,} frozen"),
        *(("", f"{part} {count:,}") for part, count in facts.parts.items()),
        ("stored as", ", ".join(facts.dtypes)),
    ]
    yield click.style(name, bold=True)
    for label, text in rows:
        yield f"  {label:<10}  {text}"
    if not facts.differences:
        yield f"  {'weights':<10}  {click.style('complete', fg='green')}"
        return
    for kind, names in facts.as_json()["weights"].items():
        for index, weight in enumerate(names):
            label = kind.replace("_", " ") if index == 0 else ""
            yield f"  {click.style(f'{label:<16}', fg='red')}  {weight}"


def _options(options: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """`name = value`, one a line, nested ones dotted."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _options(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name} = {json.dumps(value)}"
