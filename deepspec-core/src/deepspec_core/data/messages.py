"""One message of a conversation, in the one shape that chat templates agree on.

Knows roles, their other names, parts of content, tool calls and tools. Does not know rows, files or templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from deepspec_core.errors import DataError, nearest

ROLES: Final = ("system", "user", "assistant", "tool")
_CALL: Final = "function_call"
_ALIASES: Final = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    # ShareGPT's name for an assistant's message that is a call and nothing else.
    _CALL: "assistant",
}
# The types of parts that are text, as the OpenAI interfaces name them.
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
# Between the text parts of one message. Servers with OpenAI's interface join them so.
_BETWEEN_PARTS: Final = "\n"
# Where a call's arguments stand. The first that is not empty counts.
_ARGUMENTS: Final = ("arguments", "parameters", "input")
# Where an answer's thinking stands. The first that is not empty counts.
_THINKING: Final = ("reasoning_content", "reasoning", "thinking")
# Fields of a message or of a row that belong to its question, and are not text.
MEDIA: Final = ("images", "image", "videos", "video", "audios", "audio")
_NOTHING: Final[tuple[Any, ...]] = (None, "", [], ())
_DEEPEST: Final = 64
_NESTED: Final = (Mapping, list, tuple)
_JSON: Final = (*_NESTED, str, int, float, type(None))


class UnusableRow(DataError):
    """A well-formed row that says what no conversation here can hold: images, unknown roles, an answer of nothing.

    Sources drop and count such rows. Tasks and prompts refuse them.
    """


def listed(value: Any, name: str, where: str) -> Sequence[Any]:
    """The value, if it is a list; else DataError."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(f"{name} is not a list", where=where, found=type(value).__name__, expected="a list")
    return value


def message_of(item: Any, where: str) -> dict[str, Any]:
    """A message with `role`, `content` and what else it says.

    Raises DataError, saying `where`, if it is malformed; raises UnusableRow if it says what no conversation here can
    hold.
    """
    if not isinstance(item, Mapping):
        raise DataError("A message is not an object", where=where, found=repr(item)[:80], expected="{role, content}")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if isinstance(role, str) and role.lower() == _CALL:
        called = _parsed(content, where)
        item, content = {**item, "tool_calls": called if isinstance(called, list) else [called]}, None
    if isinstance(role, str):
        role = _ALIASES.get(role.lower(), role.lower())
    if role not in ROLES:
        raise UnusableRow(
            "A message has no known role",
            where=where,
            found=repr(role),
            expected=", ".join((*ROLES, *_ALIASES)),
            fix=f"Is {near!r} meant?" if isinstance(role, str) and (near := nearest(role, ROLES)) else None,
        )
    refuse_media(item, where)
    extras = _extras(item, role, where)
    if content is None and "tool_calls" in extras:
        content = ""
    return {"role": role, "content": _content(content, where), **extras}


def refuse_media(item: Mapping[str, Any], where: str) -> None:
    """Raise UnusableRow if a message or a row has images and the like beside its text."""
    name = next((name for name in MEDIA if item.get(name)), None)
    if name is not None:
        raise UnusableRow("A conversation is about more than its text", where=where, found=name, expected="text alone")


def _content(content: Any, where: str) -> str:
    """The text of a message, its parts joined where it has parts."""
    if content is None:
        raise UnusableRow(
            "A message has no content",
            where=where,
            found="null, without a tool call",
            expected="text, a list of parts, or a tool call",
        )
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise DataError(
            "A message's content is not text",
            where=where,
            found=repr(content)[:80],
            expected="a string, or a list of parts",
        )
    return _BETWEEN_PARTS.join(_part(part, f"{where} content[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise DataError(
            "A part of a message is malformed",
            where=where,
            found=repr(part)[:80],
            expected='{"type": "text", "text": ...}',
        )
    if kind not in _TEXT_PARTS:
        raise UnusableRow(
            "A part of a message is not text", where=where, found=kind, expected=f"one of {', '.join(_TEXT_PARTS)}"
        )
    return _text(part.get("text"), f"{where} text")


def _extras(item: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a message says beside its content; fields that are empty, as tables have them, are left out."""
    extras: dict[str, Any] = {}
    if role == "assistant":
        thinking = _thinking(item, where)
        if thinking:
            extras["reasoning_content"] = thinking
        if _is_context(item, where):
            extras["weight"] = 0
        # The older name holds a single call.
        calls = item.get("tool_calls") or ([item["function_call"]] if item.get("function_call") else ())
        if calls:
            several = enumerate(listed(calls, "tool_calls", where))
            extras["tool_calls"] = [_tool_call(call, f"{where} tool_calls[{i}]") for i, call in several]
    if role == "tool":
        if item.get("name"):
            extras["name"] = _text(item["name"], f"{where} name")
        identity = item.get("tool_call_id")
        if identity:
            as_text = str(identity) if type(identity) is int else identity
            extras["tool_call_id"] = _text(as_text, f"{where} tool_call_id")
    return extras


def _thinking(item: Mapping[str, Any], where: str) -> str:
    """An answer's thinking, "" where it has none. Raises UnusableRow if there is some that cannot be read."""
    name = next((name for name in _THINKING if item.get(name)), None)
    if name is not None:
        return _text(item[name], f"{where} {name}")
    parts = listed(item.get("reasoning_details") or (), "reasoning_details", where)
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UnusableRow(
            "An answer's thinking is not text",
            where=f"{where} reasoning_details",
            found=repr(parts)[:80],
            expected=f'{{"text": ...}} in each part, or {", ".join(_THINKING)}',
        )
    return _BETWEEN_PARTS.join(map(str, texts))


def _is_context(item: Mapping[str, Any], where: str) -> bool:
    """Whether the row says that this answer is there to be read and not to be learned: weight 0, or train false."""
    for name in ("weight", "train"):
        if item.get(name) not in (None, 0, 1):
            raise DataError(
                f"A message's {name} cannot be used",
                where=f"{where} {name}",
                found=repr(item[name])[:80],
                expected="0 or false, and the answer is not trained on; 1, true, or nothing",
            )
    return item.get("weight") == 0 or item.get("train") == 0


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
    # Some put them beside the function.
    beside = {key: call[key] for key in _ARGUMENTS if key in call} if function is not call else {}
    arguments = _arguments({**beside, **function}, where)
    require_json(arguments, where)
    identity = {"id": str(call["id"])} if call.get("id") else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _arguments(function: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A call's arguments, {} where it says none.

    Raises DataError if they are no object, or stand under another name.
    """
    name = next((name for name in _ARGUMENTS if function.get(name) not in _NOTHING), None)
    if name is None:
        others = [key for key, value in function.items() if key not in _ARGUMENTS and _may_be_arguments(value)]
        if others:
            raise DataError(
                "A tool call's arguments have an unknown name",
                where=where,
                found=", ".join(map(str, others)),
                expected=" or ".join(_ARGUMENTS),
            )
        return {}
    arguments = _parsed(function[name], where)
    if arguments in _NOTHING:
        return {}
    if not isinstance(arguments, Mapping):
        raise DataError(
            "A tool call's arguments are not an object", where=where, found=repr(arguments)[:80], expected="{...}"
        )
    return arguments


def _may_be_arguments(value: Any) -> bool:
    return bool(value) and (isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith("{")))


def tools_of(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """A row's tools: function schemas, or the same as JSON text.

    Raises DataError, saying `where`, for anything else.
    """
    tools = _parsed(value or [], where) or []
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError("tools is not a list of objects", where=where, found=repr(tools)[:80], expected="[{...}, ...]")
    require_json(tools, where)
    return tuple(dict(tool) for tool in tools)


def require_json(value: Any, where: str, what: str = "A tool or a tool call") -> None:
    """Raise DataError for what JSON cannot hold, such as dates and bytes of tables, or for more levels than any schema
    has. `what` is the value's name in errors.

    Rendering and digests go through it recursively.
    """
    level = [value]
    for _ in range(_DEEPEST):
        parts = [part.values() if isinstance(part, Mapping) else part for part in level if isinstance(part, _NESTED)]
        level = [inner for part in parts for inner in part]
        odd = next((inner for inner in level if not isinstance(inner, _JSON)), None)
        if odd is None:
            keys = (key for part in level if isinstance(part, Mapping) for key in part)
            odd = next((key for key in keys if not isinstance(key, str)), None)
        if odd is not None:
            raise DataError(
                f"{what} holds a value that JSON does not have",
                where=where,
                found=f"{repr(odd)[:80]}, a {type(odd).__name__}",
                expected="text, numbers, true, false, null, lists and objects",
            )
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
            "Not JSON", where=where, found=repr(value)[:80], expected="JSON text, or the value itself"
        ) from error
