"""One conversation, and how the shapes found on disk and on the Hub become one.

Knows row formats and identities; does not know files, templates or tokens' meaning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from attrs import frozen

from deepspec_core.errors import DataError, nearest

ROLES: Final = ("system", "user", "assistant", "tool")
_ALIASES: Final = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_FIELDS: Final = ("messages", "conversations", "turns", "prompt_ids", "input_ids")


@frozen(kw_only=True)
class Conversation:
    """Messages ({"role", "content"}), and tokens where the row came with them.

    input_ids and loss_mask (1 = supervised) are given together or not at all; such tokens are what the target really
    read and emitted, so training takes them instead of rendering the messages again.
    """

    id: str
    messages: tuple[dict[str, str], ...]
    input_ids: tuple[int, ...] | None = None
    loss_mask: tuple[int, ...] | None = None

    @property
    def digest(self) -> str:
        """Of the content alone, without the id."""
        return content_digest(self.messages, self.input_ids, self.loss_mask)


def content_digest(
    messages: Sequence[Mapping[str, str]], input_ids: Sequence[int] | None, loss_mask: Sequence[int] | None
) -> str:
    """24 hex digits that depend on roles, texts and tokens only."""
    content = json.dumps([list(messages), input_ids, loss_mask], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def from_row(row: Any, where: str) -> Conversation:
    """A row of any accepted shape; DataError saying `where` (file:line) it is malformed.

    Accepted: `messages` [{role, content}]; `conversations` [{from, value}] (or role and content); `turns` [text], the
    user's only; each with `id` or without (a digest of the content then). Tokens: `input_ids` with `loss_mask`, or what
    regeneration writes: `prompt_ids` and `output_ids`, with `prompt_answers` [[begin, end]], the token spans of the
    prompt that are earlier answers as the target emitted them.
    """
    if not isinstance(row, Mapping):
        raise DataError("A row is not an object", where=where, found=type(row).__name__, expected="{...}")
    messages = _messages(row, where)
    input_ids, loss_mask = _tokens(row, where)
    if not messages and input_ids is None:
        keys = ", ".join(sorted(map(str, row)))
        close = next((near for key in row if (near := nearest(str(key), _FIELDS))), None)
        raise DataError(
            "A row holds no conversation",
            where=where,
            found=f"fields {keys}" if keys else "no fields",
            expected="messages, conversations or turns, not empty",
            fix=f"Is {close!r} meant?" if close else None,
        )
    identity = row.get("id")
    name = content_digest(messages, input_ids, loss_mask) if identity in (None, "") else str(identity)
    return Conversation(id=name, messages=messages, input_ids=input_ids, loss_mask=loss_mask)


def _messages(row: Mapping[str, Any], where: str) -> tuple[dict[str, str], ...]:
    if row.get("messages") is not None:
        return tuple(_message(item, f"{where} messages[{i}]") for i, item in enumerate(_list(row, "messages", where)))
    if row.get("conversations") is not None:
        items = _list(row, "conversations", where)
        return tuple(_message(item, f"{where} conversations[{i}]") for i, item in enumerate(items))
    if row.get("turns") is not None:
        items = _list(row, "turns", where)
        return tuple(_message({"role": "user", "content": item}, f"{where} turns[{i}]") for i, item in enumerate(items))
    return ()


def _list(row: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    value = row[name]
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(f"{name} is not a list", where=where, found=type(value).__name__, expected="a list")
    return value


def _message(item: Any, where: str) -> dict[str, str]:
    if not isinstance(item, Mapping):
        raise DataError("A message is not an object", where=where, found=repr(item)[:80], expected="{role, content}")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise DataError(
            "A message has no known role",
            where=where,
            found=repr(role),
            expected=", ".join((*ROLES, *_ALIASES)),
            fix=f"Is {near!r} meant?" if isinstance(role, str) and (near := nearest(role, ROLES)) else None,
        )
    if not isinstance(content, str):
        raise DataError("A message's content is not text", where=where, found=repr(content)[:80], expected="a string")
    return {"role": role, "content": content}


def _tokens(row: Mapping[str, Any], where: str) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    if row.get("output_ids") is not None:
        prompt, output = _ids(row, "prompt_ids", where), _ids(row, "output_ids", where)
        mask = [0] * len(prompt) + [1] * len(output)
        for begin, end in row.get("prompt_answers") or ():
            if not 0 <= begin < end <= len(prompt):
                raise DataError(
                    "prompt_answers leaves the prompt",
                    where=where,
                    found=[begin, end],
                    expected=f"within {len(prompt)}",
                )
            mask[begin:end] = [1] * (end - begin)
        return prompt + output, tuple(mask)
    if row.get("input_ids") is None:
        return None, None
    ids, given = _ids(row, "input_ids", where), _ids(row, "loss_mask", where)
    if len(ids) != len(given):
        raise DataError(
            "input_ids and loss_mask differ in length",
            where=where,
            found=f"{len(ids)} and {len(given)}",
            expected="one each",
        )
    if not set(given) <= {0, 1}:
        raise DataError("loss_mask holds other numbers than 0 and 1", where=where, found=sorted(set(given))[:5])
    return ids, given


def _ids(row: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    value = row.get(name)
    if isinstance(value, Sequence) and all(isinstance(item, int) and item >= 0 for item in value):
        return tuple(int(item) for item in value)
    raise DataError(
        f"{name} is not a list of token ids", where=where, found=repr(value)[:80], expected="[12, 345, ...]"
    )
