"""Turns a server's response into an answer: its token ids, and whether it is complete.

Token ids are used if the server returns them. Otherwise the response's text is tokenised here, and the number of tokens
is compared with the server's count. Knows answers; knows no connections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspec_core.data.answering import Answer
from deepspec_core.data.unicode_text import not_unicode
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.servers.connection import Fault, Kind, shown
from deepspec_core.servers.wanted import Wanted

STOP, LENGTH = "stop", "length"


def read(content: dict[str, Any], request: Request, wanted: Wanted, *, model: str) -> Answer:
    """The answer; Fault where it is none, or half of one, or another model's, or answers another prompt."""
    choice, limit = choice_of(content, model), wanted.limit(request.prompt_ids)
    usage = content.get("usage")
    counted = usage if isinstance(usage, dict) else {}
    _require_prompt(choice, counted, request.prompt_ids)
    reason, mismatched = choice.get("finish_reason"), False
    if has_ids(choice):
        output = _up_to_stop(choice["token_ids"], wanted.stop_ids)
        if not all(0 <= token < wanted.vocab_size for token in output):
            raise Fault(Kind.WRONG, "token ids beyond the target's vocabulary")
    else:
        if reason not in (STOP, LENGTH):
            raise Fault(Kind.BAD, f"half an answer: finish_reason {reason!r}")
        output, mismatched = _tokenised(choice["text"], reason, counted.get("completion_tokens"), limit, wanted)
    if not output:
        raise Fault(Kind.BAD, "an answer of no token")
    ended = output[-1] in wanted.stop_ids
    if not mismatched and len(output) > limit:
        raise Fault(Kind.BAD, f"{len(output)} tokens, where {limit} were asked for")
    if not ended and not mismatched and len(output) < limit:
        raise Fault(Kind.BAD, f"half an answer: {len(output)} tokens without an end, finish_reason {reason!r}")
    completion = Completion(
        id=request.id,
        prompt_ids=request.prompt_ids,
        output_ids=tuple(output[:limit]),
        finish_reason=STOP if output[:limit][-1] in wanted.stop_ids else LENGTH,
        rounds=(),
    )
    return Answer(completion=completion, mismatched=mismatched)


def choice_of(content: dict[str, Any], model: str) -> dict[str, Any]:
    """The only choice of an answer; Fault where there is none, or it is another model's."""
    name = content.get("model")
    # Some servers add the revision.
    if name is not None and name != model and str(name).split("@")[0] != model:
        raise Fault(Kind.WRONG, f"the answer is by {shown(str(name))}, and {model!r} was asked")
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
        raise Fault(Kind.BAD, f"no choice with a text: {shown(str(content))}")
    return choice


def has_ids(choice: dict[str, Any]) -> bool:
    """Whether the server returns the ids of an answer."""
    ids = choice.get("token_ids")
    return isinstance(ids, list) and all(type(token) is int for token in ids)


def _require_prompt(choice: dict[str, Any], counted: dict[str, Any], prompt_ids: tuple[int, ...]) -> None:
    said, number = choice.get("prompt_token_ids"), counted.get("prompt_tokens")
    if said is not None and said != list(prompt_ids):
        raise Fault(Kind.WRONG, "it read other token ids than it was sent")
    if number is not None and number != len(prompt_ids):
        raise Fault(Kind.BAD, f"it read a prompt of {number} tokens, where {len(prompt_ids)} were meant")


def _up_to_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((index + 1 for index, token in enumerate(ids) if token in stop_ids), len(ids))
    return list(ids[:end])


def _tokenised(text: str, reason: str, count: Any, limit: int, wanted: Wanted) -> tuple[list[int], bool]:
    """The ids of a text that may lack its end marker, and whether they are not as many as the server counted."""
    if type(count) is not int:
        raise Fault(Kind.BAD, "no count of tokens (usage.completion_tokens)")
    if found := not_unicode(text):
        raise Fault(Kind.BAD, f"a text that is not valid Unicode: {found}")
    ids, _ = wanted.tokenizer.encode(text)
    ids = _up_to_stop(ids, wanted.stop_ids)
    if ids and ids[-1] in wanted.stop_ids:
        return ids, len(ids) != count
    # One at the very limit counts as cut to some servers.
    ended = reason == STOP or len(ids) + 1 == count == limit
    # Some servers do not count the end marker.
    fits = len(ids) + 1 == count or (reason == STOP and len(ids) == count) if ended else len(ids) == count
    return [*ids, wanted.end_id] if ended else ids, not fits
