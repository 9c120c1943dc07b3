"""Finds texts that contain a control token of the chat template, which the tokenizer would not tell from a real one.

An answer that contains the end marker and a user's header would become a turn that nobody wrote. Knows tokenizers,
messages and tools; does not know where conversations come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def control_tokens(tokenizer: Any, written: str) -> tuple[str, ...]:
    """The special tokens that the chat template itself writes, as text: those in its source and its renderings."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(token for token in special if token and token in written))


def found_in(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    system_prompt: str | None,
    tokenizer: Any,
    tokens: Sequence[str],
) -> str | None:
    """The first of these tokens in the texts, and its place; None if there is none."""
    said = [(f"message {i} ({each['role']})", {**each, "role": ""}) for i, each in enumerate(messages)]
    for where, value in [("the system prompt", system_prompt), ("the tools on offer", tools), *said]:
        for text in _texts(value):
            found = _token_in(text, tokenizer, tokens)
            if found is not None:
                return f"{found!r} in {where}"
    return None


def _token_in(text: str, tokenizer: Any, tokens: Sequence[str]) -> str | None:
    for token in tokens:
        if token in text:
            return token
    # A tokenizer may treat similar characters, or capitals, as the same. Only token ids show it.
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or (read := normalizer.normalize_str(text)) == text:
        return None
    if not any(token in read or normalizer.normalize_str(token) in read for token in tokens):
        return None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return next((token for token in tokens if tokenizer.convert_tokens_to_ids(token) in ids), None)


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
