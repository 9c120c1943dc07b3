"""`deepspec generate --target T [--draft D] [PROMPT]`: one answer, streamed, with its rounds and its speed."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from deepspec_core.config.schema import DTYPES
from deepspec_core.errors import DataError

if TYPE_CHECKING:
    from deepspec_core.decoding.engine import Clock, Committed
    from deepspec_core.interface.generating import Generation
    from deepspec_core.interface.models import Draft, Target

# Accepted tokens of one round and of the next.
_COLOURS = ("green", "cyan")


@click.command()
@click.option("--target", required=True, metavar="MODEL", help="A directory, a Hub id, or builtin:NAME.")
@click.option("--draft", metavar="DIR_OR_ID", help="A draft checkpoint of this target. Left out: plain decoding.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--thinking", is_flag=True, help="Ask in the target's thinking mode.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--confidence-threshold", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32 on CPU, bfloat16 elsewhere.")
@click.option("--plain/--no-plain", default=True, show_default=True, help="With a draft: time plain decoding too.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: one object, when all is done.")
@click.argument("prompt", required=False)
def generate(
    target: str,
    draft: str | None,
    max_new_tokens: int,
    temperature: float,
    thinking: bool,
    system: str | None,
    seed: int,
    confidence_threshold: float,
    dtype: str | None,
    plain: bool,
    as_json: bool,
    prompt: str | None,
) -> None:
    """Answer PROMPT, or what stands on standard input.

    The answer goes to standard output as rounds commit it. On a terminal, accepted draft tokens are coloured, the
    colour changing with the round; the target's own tokens are not. Figures follow on standard error.
    """
    text = _prompt(prompt)
    from deepspec_core.decoding.engine import Clock
    from deepspec_core.interface.generating import generate as decode
    from deepspec_core.interface.models import load_draft, load_target
    from deepspec_core.pipeline import threads

    model = load_target(target, dtype=dtype)
    drafted = None if draft is None else load_draft(draft, model)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "thinking": thinking,
        "system_prompt": system,
        "seed": seed,
    }
    show = None if as_json else _Stream(model)
    clock, plain_clock, reference = Clock(), Clock(), None
    with threads.using(threads.for_decoding(model.architecture, model.model.device, batch_size=1)):
        # First calls pay for memory and the choice of kernels.
        decode(model, drafted, text, **{**options, "max_new_tokens": 2})
        [found] = decode(
            model, drafted, text, **options, confidence_threshold=confidence_threshold, clock=clock, on_round=show
        )
        if show is not None:
            show.end()
        if drafted is not None and plain:
            [reference] = decode(model, None, text, **options, clock=plain_clock)
    if as_json:
        click.echo(json.dumps(_as_json(found, clock, drafted, reference, plain_clock), ensure_ascii=False, indent=1))
        return
    for line in _figures(found, clock, drafted, reference, plain_clock, greedy=temperature == 0):
        click.echo(line, err=True)


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise click.UsageError("Give a prompt, as an argument or on standard input.")
    text = sys.stdin.read() if given is None else given
    if not text.strip():
        raise DataError("the prompt is empty", where="PROMPT" if given is not None else "standard input")
    return text.strip("\n")


class _Stream:
    """Writes the answer as it is committed; on a terminal in colours."""

    def __init__(self, target: Target) -> None:
        from deepspec_core.decoding.text_stream import TextStream

        self._text = TextStream(lambda ids: str(target.tokenizer.decode(list(ids), skip_special_tokens=True)))
        self._round = 0

    def __call__(self, committed: Committed) -> None:
        colour = _COLOURS[self._round % len(_COLOURS)]
        self._round += 1
        for index, token in enumerate(committed.ids):
            piece = self._text.push(token)
            # click leaves colours out where standard output is no terminal.
            click.echo(click.style(piece, fg=colour) if index < committed.accepted else piece, nl=False)
        sys.stdout.flush()

    def end(self) -> None:
        """What is left of the text, and the end of the line."""
        click.echo(self._text.rest())


def _speed(found: Generation, clock: Clock) -> float:
    return len(found.ids) / clock.wall if clock.wall else 0.0


def _figures(
    found: Generation,
    clock: Clock,
    draft: Draft | None,
    reference: Generation | None,
    plain_clock: Clock,
    *,
    greedy: bool,
) -> list[str]:
    line = (
        f"{len(found.ids):,} tokens ({found.finish_reason}) in {clock.wall:.2f} s, {_speed(found, clock):.1f} tokens/s"
    )
    if draft is None:
        return [line]
    lines = [f"{line}; {len(found.rounds):,} rounds, accepted length {found.accepted_length:.2f}"]
    if reference is not None:
        plain = _speed(reference, plain_clock)
        ratio = f": {_speed(found, clock) / plain:.2f}x with the draft" if plain else ""
        lines.append(f"plain decoding: {plain:.1f} tokens/s{ratio}")
        if greedy:
            same = "equal" if reference.ids == found.ids else "NOT equal"
            lines.append(f"the two outputs are {same}, token for token")
    return lines


def _as_json(
    found: Generation, clock: Clock, draft: Draft | None, reference: Generation | None, plain_clock: Clock
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "text": found.text,
        "ids": list(found.ids),
        "prompt_ids": list(found.prompt_ids),
        "finish_reason": found.finish_reason,
        "seconds": clock.wall,
        "tokens_per_second": _speed(found, clock),
    }
    if draft is not None:
        report["accepted_length"] = found.accepted_length
        report["rounds"] = [
            {
                "proposed": one.proposal_length,
                "accepted": one.accepted_draft_length,
                "committed": one.acceptance_length,
            }
            for one in found.rounds
        ]
    if reference is not None:
        report["plain"] = {
            "seconds": plain_clock.wall,
            "tokens_per_second": _speed(reference, plain_clock),
            "same_ids": reference.ids == found.ids,
        }
    return report
