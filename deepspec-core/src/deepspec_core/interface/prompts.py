"""Prompts of the Python interface, and how they become token ids.

A prompt is a text (one user turn), a list of messages, or token ids. Knows these forms; the target's chat template
turns messages into text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any

from attrs import define

from deepspec_core.data.conversations import from_row
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.data.unicode_text import not_unicode
from deepspec_core.errors import DataError
from deepspec_core.interface.models import Target

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]

_SHAPES = "text, a list of messages with `role` and `content`, or a list of token ids"


def listed(prompts: Any) -> list[Prompt]:
    """The prompts as a list; a single prompt becomes a list of one. DataError for anything else."""
    if isinstance(prompts, (str, bytes, bytearray)):
        return [prompts]
    if isinstance(prompts, Mapping) or not _is_list(prompts):
        raise DataError(
            "this is neither a prompt nor a list of prompts",
            where="prompts",
            found=type(prompts).__name__,
            expected=f"{_SHAPES}; or a list of those",
            fix="Put a single message into a list." if isinstance(prompts, Mapping) else None,
        )
    several = _as_list(prompts)
    if several and (isinstance(several[0], Integral) or (isinstance(several[0], Mapping) and "role" in several[0])):
        return [several]
    return several


@define(slots=False)
class PromptReader:
    """Turns prompts into token ids for one target. The chat template is opened only if a prompt needs it."""

    target: Target
    thinking: bool
    system_prompt: str | None

    def ids(self, prompt: Any, where: str) -> tuple[int, ...]:
        """The ids of one prompt. DataError, at `where`, if it is malformed, empty or too long."""
        return self._fitting(self._read(prompt, where), where)

    def _read(self, prompt: Any, where: str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._rendered([{"role": "user", "content": prompt}], where)
        no_list = not _is_list(prompt)
        # Bytes would pass for a list of ids below 256.
        if isinstance(prompt, (Mapping, bytes, bytearray)) or no_list:
            raise DataError("this is not a prompt", where=where, found=type(prompt).__name__, expected=_SHAPES)
        parts = _as_list(prompt)
        if not parts:
            raise _empty(where)
        if not isinstance(parts[0], Integral):
            return self._rendered(parts, where)
        other = next((part for part in parts if not _is_id(part)), None)
        if other is not None:
            raise DataError(
                "a prompt's ids are not whole numbers",
                where=where,
                found=repr(other),
                expected="whole numbers, such as [12, 34]",
            )
        return tuple(map(int, parts))

    @cached_property
    def _tokenizer(self) -> ChatTokenizer:
        return chat_tokenizer(self.target, self.thinking)

    def _rendered(self, messages: list[Any], where: str) -> tuple[int, ...]:
        read = from_row({"messages": messages}, where).messages
        if read[-1]["role"] == "assistant":
            raise DataError(
                "a prompt ends with the assistant's message", where=where, expected="a user's message at the end"
            )
        if not read[-1]["content"].strip():
            raise _empty(where)
        found = not_unicode(read, self.system_prompt)
        if found is not None:
            raise DataError("a prompt is not valid Unicode", where=where, found=found)
        try:
            return self._tokenizer.render_prompt(read, self.system_prompt)
        except DataError as error:
            raise DataError(
                error.problem, where=error.where or where, found=error.found, expected=error.expected, fix=error.fix
            ) from error

    def _fitting(self, ids: tuple[int, ...], where: str) -> tuple[int, ...]:
        architecture = self.target.architecture
        outside = next((token for token in ids if not 0 <= token < architecture.vocab_size), None)
        if outside is not None:
            raise DataError(
                "a prompt has ids outside the vocabulary",
                where=where,
                found=outside,
                expected=f"ids from 0 to {architecture.vocab_size - 1}",
            )
        if len(ids) >= architecture.max_positions:
            raise DataError(
                "a prompt leaves the target no room to answer",
                where=where,
                found=f"{len(ids):,} tokens",
                expected=f"fewer than {architecture.max_positions:,}, the target's positions",
            )
        return ids


def chat_tokenizer(target: Target, thinking: bool) -> ChatTokenizer:
    """The target's tokenizer in a mode. DataError where its chat template does not know the mode."""
    tokenizer = target.chat(thinking=thinking)
    if not tokenizer.can_ask(thinking, target.adapter.conversation_format()):
        raise DataError(
            "the chat template has no thinking mode: prompts are the same with and without it",
            where="the argument `thinking`",
            found=thinking,
            expected="False, or a template that reads `enable_thinking`",
        )
    return tokenizer


def _is_list(value: Any) -> bool:
    """Whether there are items in it: an array of no dimensions has a value and none."""
    if hasattr(value, "tolist"):
        return bool(getattr(value, "ndim", 1))
    return isinstance(value, Iterable)


def _as_list(values: Any) -> list[Any]:
    """Arrays and tensors as lists of Python's own numbers."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _is_id(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _empty(where: str) -> DataError:
    return DataError("a prompt is empty", where=where, expected=_SHAPES)
