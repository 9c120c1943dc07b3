"""One conversation, and how the shapes found on disk and on the Hub become one.

Knows row formats and identities; does not know files, templates or tokens' meaning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
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
    "function": "tool",
    "observation": "tool",
}
_DEEPEST: Final = 64
_NESTED: Final = (Mapping, list, tuple)
_FIELDS: Final = ("messages", "conversations", "turns", "prompt_ids", "input_ids")


@frozen(kw_only=True)
class Conversation:
    """Messages, the tools they may call, and tokens where the row came with them.

    A message has `role` and `content`; an assistant's may have `reasoning_content` and `tool_calls` ({"type":
    "function", "function": {"name", "arguments"}}, arguments an object), a tool's `name` and `tool_call_id`.

    input_ids and loss_mask (1 = supervised) are given together or not at all; such tokens are what the target really
    read and emitted, so training takes them instead of rendering the messages again. `rewritten` are earlier answers
    that input_ids no longer hold as they were emitted: (prompt ids, output ids) of each.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    input_ids: tuple[int, ...] | None = None
    loss_mask: tuple[int, ...] | None = None
    rewritten: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def digest(self) -> str:
        """Of the content alone, without the id."""
        return content_digest(self.messages, self.input_ids, self.loss_mask, self.tools)

    def given(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Token ids and loss mask of every row the conversation came with, earlier answers first."""
        for prompt, output in self.rewritten:
            yield prompt + output, (0,) * len(prompt) + (1,) * len(output)
        if self.input_ids is not None and self.loss_mask is not None:
            yield self.input_ids, self.loss_mask


def content_digest(
    messages: Sequence[Mapping[str, Any]],
    input_ids: Sequence[int] | None,
    loss_mask: Sequence[int] | None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """24 hex digits that depend on roles, texts, tools and tokens only."""
    content = [list(messages), input_ids, loss_mask, *([list(tools)] if tools else [])]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def from_row(row: Any, where: str) -> Conversation:
    """A row of any accepted shape; DataError saying `where` (file:line) it is malformed.

    Accepted: `messages` [{role, content}]; `conversations` [{from, value}] (or role and content); `turns` [text], the
    user's only; each with `id` or without (a digest of the content then), and with `tools`, a list of function schemas
    (or the same as JSON text), or without. Tokens: `input_ids` with `loss_mask`, or what regeneration writes:
    `prompt_ids` and `output_ids`, with `prompt_answers` [[begin, end]], the token spans of the prompt that are earlier
    answers as the target emitted them, and `rewritten` [[prompt ids, output ids]], those that the prompt rewrites.
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
    tools = _tools(row, where)
    identity = row.get("id")
    name = content_digest(messages, input_ids, loss_mask, tools) if identity in (None, "") else str(identity)
    return Conversation(
        id=name,
        messages=messages,
        tools=tools,
        input_ids=input_ids,
        loss_mask=loss_mask,
        rewritten=_rewritten(row, where),
    )


def _messages(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
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


def _message(item: Any, where: str) -> dict[str, Any]:
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
    extras = _extras(item, role, where)
    if content is None and "tool_calls" in extras:
        content = ""
    if not isinstance(content, str):
        raise DataError("A message's content is not text", where=where, found=repr(content)[:80], expected="a string")
    return {"role": role, "content": content, **extras}


def _extras(item: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a message says beside its content; fields that are empty, as tables have them, are left out."""
    extras: dict[str, Any] = {}
    if role == "assistant":
        reasoning = item.get("reasoning_content") or item.get("reasoning")
        if reasoning:
            extras["reasoning_content"] = _text(reasoning, f"{where} reasoning_content")
        if item.get("tool_calls"):
            calls = enumerate(_list(item, "tool_calls", where))
            extras["tool_calls"] = [_tool_call(call, f"{where} tool_calls[{i}]") for i, call in calls]
    if role == "tool":
        extras |= {key: _text(item[key], f"{where} {key}") for key in ("name", "tool_call_id") if item.get(key)}
    return extras


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError("A message's field is not text", where=where, found=repr(value)[:80], expected="a string")
    return value


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call in the one shape templates agree on, whether or not `function` and JSON text were around its parts."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise DataError(
            "A tool call names no function",
            where=where,
            found=repr(call)[:80],
            expected='{"function": {"name": ..., "arguments": {...}}}',
        )
    arguments = _parsed(function.get("arguments") or {}, where)
    if not isinstance(arguments, Mapping):
        raise DataError(
            "A tool call's arguments are not an object", where=where, found=repr(arguments)[:80], expected="{...}"
        )
    _require_shallow(arguments, where)
    identity = {"id": str(call["id"])} if call.get("id") else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _tools(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    tools = _parsed(row.get("tools") or [], f"{where} tools")
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError("tools is not a list of objects", where=where, found=repr(tools)[:80], expected="[{...}, ...]")
    _require_shallow(tools, f"{where} tools")
    return tuple(dict(tool) for tool in tools)


def _require_shallow(value: Any, where: str) -> None:
    """DataError for JSON nested deeper than any schema or argument: rendering and digests go through it recursively."""
    level = [value]
    for _ in range(_DEEPEST):
        parts = [part.values() if isinstance(part, Mapping) else part for part in level if isinstance(part, _NESTED)]
        level = [inner for part in parts for inner in part]
        if not level:
            return
    raise DataError("JSON is nested too deep", where=where, expected=f"at most {_DEEPEST} levels")


def _parsed(value: Any, where: str) -> Any:
    """JSON text as what it says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "Not JSON", where=where, found=repr(value)[:80], expected="JSON text, or what it says"
        ) from error


def _tokens(row: Mapping[str, Any], where: str) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    if row.get("output_ids") is not None:
        prompt, output = _ids(row, "prompt_ids", where), _ids(row, "output_ids", where)
        mask = [0] * len(prompt) + [1] * len(output)
        for begin, end in _pairs(row, "prompt_answers", where):
            if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin < end <= len(prompt)):
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


def _rewritten(row: Mapping[str, Any], where: str) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    pairs = [{"prompt": prompt, "output": output} for prompt, output in _pairs(row, "rewritten", where)]
    return tuple((_ids(pair, "prompt", where), _ids(pair, "output", where)) for pair in pairs)


def _pairs(row: Mapping[str, Any], name: str, where: str) -> Sequence[Sequence[Any]]:
    value = row.get(name) or ()
    if isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        return value
    raise DataError(f"{name} is not a list of pairs", where=where, found=repr(value)[:80], expected="[[..., ...], ...]")


def _ids(row: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    value = row.get(name)
    if isinstance(value, Sequence) and all(isinstance(item, int) and item >= 0 for item in value):
        return tuple(int(item) for item in value)
    raise DataError(
        f"{name} is not a list of token ids", where=where, found=repr(value)[:80], expected="[12, 345, ...]"
    )
