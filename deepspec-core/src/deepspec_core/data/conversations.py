"""One conversation, and how the rows found on disk and on the Hub become one.

Knows the shapes of rows and identities. Does not know messages (messages.py), files, templates or tokens' meaning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from attrs import frozen

from deepspec_core.data.alpaca import ALPACA, INSTRUCTION, alpaca_messages, is_alpaca
from deepspec_core.data.messages import MEDIA, UnusableRow, listed, message_of, refuse_media, tools_of
from deepspec_core.errors import DataError, nearest

# Fields that hold a conversation, in the order of preference: messages; texts of the user; one such text.
_OF_MESSAGES: Final = ("messages", "conversations")
_OF_TEXTS: Final = ("turns",)
_OF_ONE_TEXT: Final = ("prompt", "question")
SHAPES: Final = (*_OF_MESSAGES, *_OF_TEXTS, *_OF_ONE_TEXT)
# Fields of a row's tokens.
TOKENS: Final = ("input_ids", "loss_mask", "prompt_ids", "output_ids", "prompt_answers", "rewritten")
# Every field that is read of a row. Columns of tables that are not among them are left unread.
FIELDS: Final = frozenset((*SHAPES, *TOKENS, *ALPACA, *MEDIA, "id", "system", "tools", "functions"))
# A field's name this alike is likely one of those, misspelled.
_MISSPELLED: Final = 0.75
# Token ids are stored as 32-bit whole numbers.
_MOST_ID: Final = 2**31 - 1


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
        """The digest of the contents, without the id."""
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
    """A row of any accepted shape. Raises DataError, saying `where` (file:line), if it is malformed; UnusableRow, a
    kind of DataError, if it is well-formed and says what no conversation here can hold.

    Accepted: `messages` [{role, content}]; `conversations` [{from, value}] (or role and content); `turns` [text], the
    user's only; `prompt` or `question`, one text of the user; `instruction` with `input` or `output` (alpaca.py). Where
    a row has several, the first of these that is not empty counts. `system` stands before messages that do not begin
    with one. A row has an `id` (text or a whole number) or none (a digest of the content then), and `tools`, a list of
    function schemas (or the same as JSON text), or `functions`, as they were called before, or none. Tokens:
    `input_ids` with `loss_mask`, or what regeneration writes: `prompt_ids` and `output_ids`, with `prompt_answers`
    [[begin, end]], the token spans of the prompt that are earlier answers as the target emitted them, and `rewritten`
    [[prompt ids, output ids]], those that the prompt rewrites.
    """
    if not isinstance(row, Mapping):
        raise DataError("A row is not an object", where=where, found=type(row).__name__, expected="{...}")
    messages = _messages(row, where)
    input_ids, loss_mask = _tokens(row, where)
    if not messages and input_ids is None:
        keys = ", ".join(sorted(map(str, row)))
        close = next((near for key in row if (near := nearest(str(key), SHAPES, cutoff=_MISSPELLED))), None)
        raise DataError(
            "A row holds no conversation",
            where=where,
            found=f"fields {keys}" if keys else "no fields",
            expected=f"one of {', '.join(SHAPES)}, not empty, or {INSTRUCTION} with input or output",
            fix=f"Is {close!r} meant?" if close and close not in row else None,
        )
    refuse_media(row, where)
    if input_ids is None:
        _refuse_silence(messages, where)
    tools = _tools(row, where)
    return Conversation(
        id=identity_of(row, where) or content_digest(messages, input_ids, loss_mask, tools),
        messages=messages,
        tools=tools,
        input_ids=input_ids,
        loss_mask=loss_mask,
        rewritten=_rewritten(row, where),
    )


def identity_of(row: Mapping[str, Any], where: str) -> str | None:
    """The row's `id` as text; None where it has none. Raises DataError for what identifies nothing."""
    identity = row.get("id")
    if identity is None or identity == "":
        return None
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise DataError(
            "A row's id is neither text nor a whole number",
            where=where,
            found=repr(identity)[:80],
            expected='an id such as "q-17" or 17; a row without an id gets one from its content',
        )
    return str(identity)


def _tools(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """`tools`; else `functions`, OpenAI's older list of what a tool holds."""
    if row.get("tools") or not row.get("functions"):
        return tools_of(row.get("tools"), f"{where} tools")
    return tuple({"type": "function", "function": one} for one in tools_of(row["functions"], f"{where} functions"))


def _messages(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """What the row says. Its `system` comes first, unless its messages bring their own."""
    said = _said(row, where)
    if not row.get("system") or not said or said[0]["role"] == "system":
        return said
    return (message_of({"role": "system", "content": row["system"]}, f"{where} system"), *said)


def _said(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    name = next((name for name in SHAPES if row.get(name) not in (None, "", [], ())), None)
    if name is None:
        said = alpaca_messages(row, where) if is_alpaca(row) else []
        return tuple(message_of(item, f"{where} {item['role']}") for item in said)
    value = row[name]
    if name in _OF_ONE_TEXT and isinstance(value, str):
        return (message_of({"role": "user", "content": value}, f"{where} {name}"),)
    if name in _OF_ONE_TEXT and not isinstance(value, list | tuple):
        raise DataError(
            f"{name} is neither text nor a list of messages", where=where, found=repr(value)[:80], expected="text"
        )
    items = enumerate(listed(value, name, where))
    if name in _OF_TEXTS:
        return tuple(message_of({"role": "user", "content": item}, f"{where} {name}[{i}]") for i, item in items)
    return tuple(message_of(item, f"{where} {name}[{i}]") for i, item in items)


def _refuse_silence(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise UnusableRow for an answer of nothing: it would teach to end at once."""
    for index, message in enumerate(messages):
        silent = not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))
        if silent and message["role"] == "assistant":
            raise UnusableRow(
                "An answer says nothing",
                where=f"{where} messages[{index}]",
                found=repr(message["content"]),
                expected="text, or a tool call",
            )


def _tokens(row: Mapping[str, Any], where: str) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    if row.get("output_ids") is not None:
        prompt, output = _ids(row, "prompt_ids", where), _ids(row, "output_ids", where)
        mask = [0] * len(prompt) + [1] * len(output)
        for begin, end in _pairs(row, "prompt_answers", where):
            if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin < end <= len(prompt)):
                raise DataError(
                    "prompt_answers has a range outside the prompt",
                    where=where,
                    found=[begin, end],
                    expected=f"within {len(prompt)}",
                )
            mask[begin:end] = [1] * (end - begin)
        return prompt + output, tuple(mask)
    if row.get("input_ids") is None:
        return None, None
    ids, given = _ids(row, "input_ids", where), _mask(row, where)
    if len(ids) != len(given):
        raise DataError(
            "input_ids and loss_mask differ in length",
            where=where,
            found=f"{len(ids)} and {len(given)}",
            expected="two lists of the same length",
        )
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
    if isinstance(value, Sequence) and all(type(item) is int and 0 <= item <= _MOST_ID for item in value):
        return tuple(value)
    raise DataError(
        f"{name} is not a list of token ids",
        where=where,
        found=repr(value)[:80],
        expected=f"[12, 345, ...], whole numbers from 0 to {_MOST_ID}",
    )


def _mask(row: Mapping[str, Any], where: str) -> tuple[int, ...]:
    value = row.get("loss_mask")
    if isinstance(value, Sequence) and all(isinstance(item, int) and item in (0, 1) for item in value):
        return tuple(map(int, value))
    raise DataError(
        "loss_mask is not a list of numbers 0 and 1", where=where, found=repr(value)[:80], expected="[0, 1, ...]"
    )
