"""`deepspec generate --target T [--draft D] [PROMPT]`: one streamed answer, then its rounds and its speed."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from deepspec_core.cli.options import sampling
from deepspec_core.config.schema import DTYPES, MOST_NODES
from deepspec_core.errors import DataError

if TYPE_CHECKING:
    from deepspec_core.interface.generating import Generation, Streamed

# Accepted tokens of one round and of the next.
_COLOURS = ("green", "cyan")


@click.command()
@click.option("--target", required=True, metavar="MODEL", help="A directory, a Hub id, or builtin:NAME.")
@click.option(
    "--draft",
    metavar="DRAFT",
    help="A draft checkpoint for this target, or a draft that is not trained: TYPE, TYPE:VALUE or TYPE:key=value,... "
    "Left out: plain decoding.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@sampling
@click.option("--thinking", is_flag=True, help="Ask in the target's thinking mode.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--confidence-threshold",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="End a proposal before its first token whose confidence is below this.",
)
@click.option(
    "--tree-nodes", type=click.IntRange(1, MOST_NODES), help="Propose trees of at most this many tokens, not chains."
)
@click.option("--chat-template", metavar="FILE", help="A Jinja file in place of the target's own chat template.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32 on CPU, bfloat16 elsewhere.")
@click.option(
    "--plain/--no-plain", default=True, show_default=True, help="With a draft: also decode without it, and compare."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: one object, printed at the end.")
@click.argument("prompt", required=False)
def generate(
    target: str,
    draft: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    thinking: bool,
    system: str | None,
    seed: int,
    confidence_threshold: float,
    tree_nodes: int | None,
    chat_template: str | None,
    dtype: str | None,
    plain: bool,
    as_json: bool,
    prompt: str | None,
) -> None:
    """Answer PROMPT, or the text on standard input.

    The answer is written to standard output round by round. On a terminal, accepted draft tokens are coloured, in
    another colour each round; the target's own tokens are not coloured. Figures follow on standard error.
    """
    text = _prompt(prompt)
    from deepspec_core.interface.generating import generate as decode
    from deepspec_core.interface.models import load_draft, load_target

    model = load_target(target, dtype=dtype, chat_template=chat_template)
    drafted = None if draft is None else load_draft(draft, model, tree_nodes=tree_nodes)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "thinking": thinking,
        "system_prompt": system,
        "seed": seed,
        "confidence_threshold": confidence_threshold,
    }
    # Without a draft there is no proposal that a threshold could end.
    without_draft = {**options, "confidence_threshold": 0.0}
    compared = drafted is not None and plain
    # The first call pays for memory and the choice of kernels, so both ways are warmed up before they are compared.
    for warmed in (drafted, None) if compared else (drafted,):
        decode(
            model, warmed, text, **{**(without_draft if compared and warmed is None else options), "max_new_tokens": 2}
        )
    stream = None if as_json else _Stream(coloured=_coloured())
    [found] = decode(model, drafted, text, **options, on_round=stream)
    if stream is not None:
        click.echo()
    reference = decode(model, None, text, **without_draft)[0] if compared else None
    if as_json:
        report = _as_json(found, drafted is not None, reference, greedy=temperature == 0)
        click.echo(json.dumps(report, ensure_ascii=False, indent=1))
        return
    for line in _figures(found, drafted is not None, reference, greedy=temperature == 0):
        click.echo(line, err=True)


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise click.UsageError("Give a prompt, as an argument or on standard input.")
    where = "standard input" if given is None else "PROMPT"
    try:
        text = sys.stdin.read() if given is None else given
        text.encode("utf-8")
    except UnicodeError:
        raise DataError("the prompt is not valid text", where=where, expected="text in UTF-8") from None
    if not text.strip():
        raise DataError("the prompt is empty", where=where)
    return text.strip("\n")


def _coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


class _Stream:
    """Writes the answer as it is committed."""

    def __init__(self, *, coloured: bool) -> None:
        self._coloured = coloured
        self._round = 0

    def __call__(self, streamed: Streamed) -> None:
        colour = _COLOURS[self._round % len(_COLOURS)]
        self._round += 1
        for index, piece in enumerate(streamed.pieces):
            from_draft = index < streamed.accepted
            styled = click.style(piece, fg=colour) if self._coloured and from_draft and piece else piece
            click.echo(styled, nl=False, color=self._coloured)
        sys.stdout.flush()


def _speed(found: Generation) -> float:
    return len(found.ids) / found.seconds


def _figures(found: Generation, drafted: bool, reference: Generation | None, *, greedy: bool) -> list[str]:
    line = f"{len(found.ids):,} tokens ({found.finish_reason}) in {found.seconds:.2f} s, {_speed(found):.1f} tokens/s"
    if not drafted:
        return [line]
    length = f"{found.accepted_length:.2f}" if found.rounds else "-"
    lines = [f"{line}; {len(found.rounds):,} rounds, accepted length {length}"]
    if reference is not None:
        ratio = _speed(found) / _speed(reference)
        lines.append(f"plain decoding: {_speed(reference):.1f} tokens/s; with the draft {ratio:.2f} times as fast")
        if greedy:
            same = "equal" if reference.ids == found.ids else "NOT equal"
            lines.append(f"the two outputs are {same}, token for token")
    return lines


def _as_json(found: Generation, drafted: bool, reference: Generation | None, *, greedy: bool) -> dict[str, Any]:
    report: dict[str, Any] = {
        "text": found.text,
        "ids": found.ids,
        "prompt_ids": found.prompt_ids,
        "finish_reason": found.finish_reason,
        "seconds": found.seconds,
        "tokens_per_second": _speed(found),
    }
    if drafted:
        report["accepted_length"] = found.accepted_length if found.rounds else None
        report["rounds"] = [
            {"proposed": one.proposed, "accepted": one.accepted, "committed": one.committed} for one in found.rounds
        ]
    if reference is not None:
        report["plain"] = {
            "seconds": reference.seconds,
            "tokens_per_second": _speed(reference),
            # Above temperature 0 the two are different draws.
            **({"same_ids": reference.ids == found.ids} if greedy else {}),
        }
    return report
