"""Finds parts of a conversation that a chat template silently leaves out: messages, tool calls, offered tools.

A template without tool support renders a tool call as an empty answer, and training would then teach empty answers.
There are two checks. Each part's own words must occur in the rendering (written.py), so nothing is cut. But the same
words may also occur elsewhere in the conversation, so each part is also replaced by a unique mark, and the marks are
searched for in a second rendering. Knows messages and rendered text; does not know how a template is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from attrs import field, frozen

from deepspec_core.data.answers import TemplateRefusal
from deepspec_core.data.digest_set import digest16
from deepspec_core.data.written import Written

Tools = Sequence[Mapping[str, Any]]
_TEXT: Final = json.JSONEncoder()
# Forms of conversations remembered: those of most data are a few hundred.
_MOST_KNOWN: Final = 1 << 14


class LeftOut(TemplateRefusal):
    """The chat template writes a conversation without something that it says."""

    def __init__(self, what: str) -> None:
        super().__init__("The chat template refuses a conversation", found=f"it leaves out {what}")


def left_out(text: str, messages: Sequence[Mapping[str, Any]], tools: Tools, *, first: int = 0) -> str | None:
    """What of these messages and tools is not in their rendering `text`, in words; None where all of it is.

    `first` is the number of the first message: -1 where it is a system prompt that the row does not have.

    What the assistant said before may be shortened by a template, which is told elsewhere (answers.Reply.lost); its
    calls may not.
    """
    written = Written(text)
    for tool in tools:
        name = name_of(tool)
        if name is not None and not written.has(name):
            return f"the tool {name!r} that is on offer"
        for part in _leaves(tool) if name is None else ():
            if not written.has_spelled(part):
                return f"the tool {json.dumps(tool)[:80]} that is on offer, which has no name"
    for index, message in enumerate(messages, first):
        if message["role"] != "assistant" and not written.has_spelled(message["content"]):
            return _content_of(index, message)
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if not written.has(function["name"]):
                return f"the call of {function['name']!r} in message {index}"
            for part in _leaves(function["arguments"]):
                if not written.has_spelled(part):
                    return f"the argument {part!r} of the call of {function['name']!r} in message {index}"
    return None


def unmarked(
    render: Callable[[list[dict[str, Any]], list[dict[str, Any]]], str],
    messages: Sequence[Mapping[str, Any]],
    tools: Tools,
    *,
    first: int = 0,
    known: dict[bytes, str | None] | None = None,
) -> str | None:
    """What is left out of a rendering with a mark in place of each part, in words; None where nothing is.

    With marks in place of words, conversations of one form are the same. `known` remembers, by form, the mark that is
    missing, so that each form is rendered once. It belongs to one `render`.

    A template may take only what it knows, a tool's name or a number, and refuse marks in its place. Each is then tried
    alone. One that is refused alone has been read, and its words (left_out) have to do.
    """
    whole, known = _marked(messages, tools, first), {} if known is None else known
    form = digest16(_TEXT.encode([whole.messages, whole.tools]))
    with suppress(TemplateRefusal):
        if form not in known:
            missing = whole.missing_in(render(whole.messages, whole.tools))
            if len(known) >= _MOST_KNOWN:
                known.clear()
            known[form] = missing
        mark = known[form]
        return None if mark is None else whole.what[mark]
    for mark in whole.what:
        alone = _marked(messages, tools, first, only=mark)
        with suppress(TemplateRefusal):
            if mark not in render(alone.messages, alone.tools):
                return whole.what[mark]
    return None


@frozen(kw_only=True)
class _Marked:
    """A conversation with marks in it, and what each stands for."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    what: dict[str, str] = field(repr=False)

    def missing_in(self, text: str) -> str | None:
        """The first mark that is not in the text."""
        return next((mark for mark in self.what if mark not in text), None)


def _marked(messages: Sequence[Mapping[str, Any]], tools: Tools, first: int, *, only: str | None = None) -> _Marked:
    """Every part marked, or `only` the one of this mark."""
    marks: dict[str, str] = {}

    def mark(what: str, own: Any) -> Any:
        name = f"zq{len(marks)}qz"
        marks[name] = what
        return name if only in (None, name) else own

    def argument(value: Any, call: str) -> Any:
        if isinstance(value, Mapping):
            return {
                mark(f"the argument {key!r} of the {call}", key): argument(inner, call) for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [argument(inner, call) for inner in value]
        return value if value is None else mark(f"the argument {value!r} of the {call}", value)

    def parameters(schema: Mapping[str, Any], tool: str) -> dict[str, Any]:
        named, described = {}, {}
        for name, about in schema["properties"].items():
            what = f"the parameter {name!r} of {tool}"
            named[name] = mark(what, name)
            described[named[name]] = with_description(about, what)
        required = schema.get("required")
        asked = {"required": [named.get(name, name) for name in required]} if isinstance(required, list) else {}
        return {**schema, "properties": described, **asked}

    def with_description(about: Any, what: str) -> Any:
        text = about.get("description") if isinstance(about, Mapping) else None
        if not isinstance(text, str) or not text.strip():
            return about
        return {**about, "description": mark(f"the description of {what}", text)}

    def offer(tool: Mapping[str, Any]) -> dict[str, Any]:
        function, name = tool.get("function", tool), name_of(tool)
        if not isinstance(function, Mapping) or name is None:
            kind = tool.get("type")
            return {**tool, "type": mark(f"a tool of type {kind!r} that is on offer", kind)} if kind else dict(tool)
        what = f"the tool {name!r} that is on offer"
        own = with_description({**function, "name": mark(what, name)}, what)
        schema = own.get("parameters")
        if isinstance(schema, Mapping) and isinstance(schema.get("properties"), Mapping):
            own["parameters"] = parameters(schema, what)
        return {**tool, "function": own} if "function" in tool else own

    def say(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        said = dict(message)
        if message["content"].strip():
            said["content"] = mark(_content_of(index, message), message["content"])
        # Earlier thinking is what templates leave out on purpose.
        if message.get("reasoning_content") and message is messages[-1]:
            said["reasoning_content"] = mark(f"the thinking of message {index}", message["reasoning_content"])
        if message.get("tool_calls"):
            said["tool_calls"] = [called(call, index) for call in message["tool_calls"]]
        return said

    def called(call: Mapping[str, Any], index: int) -> dict[str, Any]:
        function = call["function"]
        what = f"call of {function['name']!r} in message {index}"
        own = {"name": mark(f"the {what}", function["name"]), "arguments": argument(function["arguments"], what)}
        return {**call, "function": own}

    offered = [offer(tool) for tool in tools]
    return _Marked(messages=[say(index, each) for index, each in enumerate(messages, first)], tools=offered, what=marks)


def _content_of(index: int, message: Mapping[str, Any]) -> str:
    return "the system prompt" if index < 0 else f"the content of message {index} ({message['role']})"


def name_of(tool: Mapping[str, Any]) -> str | None:
    """The name of a tool on offer, None where it has none."""
    described = tool.get("function", tool)
    name = described.get("name") if isinstance(described, Mapping) else None
    return name if isinstance(name, str) else None


def _leaves(value: Any) -> Iterator[str]:
    """Keys and values of a call's arguments, as text. Numbers with a fraction have no one spelling."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif not isinstance(value, float) and value is not None:
        yield str(value)
