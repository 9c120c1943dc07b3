"""What a chat template leaves out of a conversation without a word: messages, tool calls, the tools on offer.

A template that knows no tools renders a call as an empty answer, and training would teach to answer nothing. Texts are
compared by their letters and digits, because templates trim, indent and quote. A word that is looked for may stand
elsewhere in the conversation: where tools are used, their parts are replaced by marks that stand nowhere, and the marks
are looked for in a rendering of their own. Knows messages and rendered text; not how a template is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any


def left_out(text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str | None:
    """What of these messages and tools is not in their rendering `text`, in words; None where all of it is.

    What the assistant said before may be shortened by a template, which is told elsewhere (answers.Reply.complete); its
    calls may not.
    """
    written = _Written(text)
    for tool in tools:
        name = _name_of(tool)
        if name is not None and not written.has(name):
            return f"the tool {name!r} that is on offer"
        for part in _leaves(tool) if name is None else ():
            if not written.has_spelled(part):
                return f"{part!r} of a tool on offer, which has no name"
    for index, message in enumerate(messages):
        if message["role"] != "assistant" and not written.has_spelled(message["content"]):
            return f"the content of message {index} ({message['role']})"
        for call in message.get("tool_calls", ()):
            function = call["function"]
            if not written.has(function["name"]):
                return f"the call of {function['name']!r} in message {index}"
            for part in _leaves(function["arguments"]):
                if not written.has_spelled(part):
                    return f"the argument {part!r} of the call of {function['name']!r} in message {index}"
    return None


def marked(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]] | None:
    """The conversation with a mark in place of each tool's name, call's name and argument, and tool's result.

    Also returns what each mark stands for, in words. None where there is none of these.
    """
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        name = f"zq{len(marks)}qz"
        marks[name] = what
        return name

    def argument(value: Any, call: str) -> Any:
        if isinstance(value, Mapping):
            return {mark(f"the argument {key!r} of the {call}"): argument(inner, call) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [argument(inner, call) for inner in value]
        return value if value is None else mark(f"the argument {value!r} of the {call}")

    offered: list[dict[str, Any]] = []
    for tool in tools:
        name = _name_of(tool)
        given = {"name": mark(f"the tool {name!r} that is on offer")} if name is not None else {}
        inner = tool.get("function")
        offered.append({**tool, "function": {**inner, **given}} if isinstance(inner, Mapping) else {**tool, **given})
    said: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        changed = dict(message)
        if message["role"] == "tool":
            changed["content"] = mark(f"the content of message {index} (tool)")
        if message.get("tool_calls"):
            changed["tool_calls"] = []
            for call in message["tool_calls"]:
                function = call["function"]
                what = f"call of {function['name']!r} in message {index}"
                own = {"name": mark(f"the {what}"), "arguments": argument(function["arguments"], what)}
                changed["tool_calls"].append({**call, "function": own})
        said.append(changed)
    return (said, offered, marks) if marks else None


def _name_of(tool: Mapping[str, Any]) -> str | None:
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


class _Written:
    """A rendered text, asked for parts. Most stand in it as they are; letters are looked at only where one does not."""

    def __init__(self, text: str) -> None:
        self._text = text

    def has(self, part: str) -> bool:
        """By its letters and digits."""
        return part.strip() in self._text or _letters(part) in self._letters

    def has_spelled(self, part: str) -> bool:
        """As it is, or as JSON writes it, where line breaks become letters and letters may become numbers."""
        return self.has(part) or self.has(json.dumps(part, ensure_ascii=False)) or self.has(json.dumps(part))

    @cached_property
    def _letters(self) -> str:
        return _letters(self._text)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).casefold()
