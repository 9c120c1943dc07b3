"""Texts that contain a marker of the chat template: the tokenizer would read it as the real one.

An answer with the end marker and another user's header in it would become a turn that nobody took. Knows tokenizers and
messages; not where conversations come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def control_tokens(tokenizer: Any, rendered: str) -> tuple[str, ...]:
    """The special tokens that the chat template itself writes, as text: those in a conversation that it rendered."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(token for token in special if token and token in rendered))


def found_in(messages: Sequence[Mapping[str, Any]], tokens: Sequence[str]) -> str | None:
    """The first of these tokens in what the messages say, and where; None where there is none."""
    for index, message in enumerate(messages):
        for text in _texts({key: value for key, value in message.items() if key != "role"}):
            for token in tokens:
                if token in text:
                    return f"{token!r} in message {index} ({message['role']})"
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
