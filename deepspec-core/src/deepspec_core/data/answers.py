"""Finds the assistant's answers in rendered text.

Answers are found by rendering, so markers in users' texts have no effect. For every answer two renderings are compared:
the conversation before it with the generation prompt, and the conversation that ends with it. The answer is what the
second has in addition. Text that the generation prompt already contains (an empty think block, an empty thought
channel) belongs to the template. Knows renderings; knows neither tokens nor how a template is run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final, Protocol

from attrs import frozen

from deepspec_core.contracts.target import ConversationFormat
from deepspec_core.data.written import Written
from deepspec_core.errors import DataError


class TemplateRefusal(DataError):
    """The chat template does not take this conversation, or not all of it; others it may."""


Messages = Sequence[Mapping[str, Any]]
_BEGIN: Final = itemgetter(0)


class Render(Protocol):
    """Messages to text; with `prompt` it ends where the assistant is to begin."""

    def __call__(self, messages: Messages, *, prompt: bool) -> str: ...


@frozen(kw_only=True)
class Supervision:
    """What is supervised: which answers, and what beside an answer's text and its end marker.

    `newline`: one newline after the marker. `think_block`: what the template puts between the assistant's header and
    the answer, where it does. `last_only`: of several answers the last one alone.
    """

    newline: bool = False
    think_block: bool = False
    last_only: bool = False


@frozen(kw_only=True)
class Answer:
    """Characters of a rendered conversation: the text [start, text_end), then the end marker [text_end, end)."""

    start: int
    text_end: int
    end: int


@frozen(kw_only=True)
class Openings:
    """What the generation prompt puts after the assistant's header, without thinking and with it; often nothing."""

    without_thinking: str
    with_thinking: str

    def of(self, *, thinking: bool) -> str:
        """The one of a mode."""
        return self.with_thinking if thinking else self.without_thinking


@frozen(kw_only=True)
class Reply:
    """One answer where it comes last: head + opening + text + marker + rest is the whole rendering.

    `head` ends with the assistant's header; `opening` is the template's (see Openings), `text` the assistant's.
    `added`: characters of the opening that the template leaves out when it looks back. `index`: which message it is.
    `lost`: what the template leaves out of the message's own words, if anything.
    """

    head: str
    opening: str
    text: str
    marker: str
    rest: str
    added: int
    index: int
    lost: str | None = None

    @property
    def rendering(self) -> str:
        """The conversation that ends with this answer."""
        return self.head + self.opening + self.text + self.marker + self.rest

    def begin_in(self, text: str) -> int | None:
        """Where this answer's text begins in another rendering, as it is and in its own place; None: not there."""
        for before in (self.head + self.opening, self.head):
            if text.startswith(before) and text.startswith(self.text + self.marker, len(before)):
                return len(before)
        return None

    def tokens_in(self, text: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """The tokens [begin, end) of another rendering that are this answer and its marker; None where it has none."""
        begin = self.begin_in(text)
        if begin is None:
            return None
        inside = supervised(offsets, self.spans_in(text, begin, Supervision()))
        return (inside.index(True), len(inside) - inside[::-1].index(True)) if any(inside) else None

    def spans_in(self, text: str, begin: int, supervision: Supervision) -> list[Answer]:
        """What is supervised of this answer in a text where it begins at `begin`, in order."""
        text_end = begin + len(self.text)
        end = text_end + len(self.marker)
        start = len(self.head) if supervision.think_block else begin
        spans = [Answer(start=start, text_end=text_end, end=end)]
        if supervision.newline and text.startswith("\n", end):
            spans.append(Answer(start=end, text_end=end, end=end + 1))
        return spans


def openings_of(render: Callable[[bool], str], fmt: ConversationFormat) -> Openings:
    """From a prompt rendered without (False) and with (True) thinking; DataError where it has no header of `fmt`."""
    tails = []
    for thinking in (False, True):
        prompt = render(thinking)
        header = prompt.rfind(fmt.assistant_start)
        if header < 0:
            raise DataError(
                "The chat template and the family's conversation format disagree",
                found=repr(prompt[-60:]) + " before an answer",
                expected=repr(fmt.assistant_start),
            )
        tails.append(prompt[header + len(fmt.assistant_start) :])
    return Openings(without_thinking=tails[0], with_thinking=tails[1])


def replies(
    render: Render, messages: Messages, fmt: ConversationFormat, openings: Openings, *, thinking: bool
) -> list[Reply]:
    """Every assistant message that follows a user's, in order, each as the last of its conversation."""
    found = []
    for index in answered(messages):
        prompt = render(messages[:index], prompt=True)
        whole = render(messages[: index + 1], prompt=False)
        found.append(_reply(prompt, whole, messages[index], index, fmt, openings, thinking))
    return found


def answered(messages: Messages) -> list[int]:
    """Which messages are the assistant's and follow a user's."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))
    return [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]


def rows(answers: Sequence[Reply], supervision: Supervision) -> list[tuple[str, list[Answer]]]:
    """Texts to train on, and their supervised parts: one text for all answers, if the last rendering has all of them.

    A template that rewrites earlier answers (drops their thinking) gets one row an answer instead: what it writes of
    an earlier one is no longer what the target would emit there.
    """
    if not answers:
        return []
    text = answers[-1].rendering
    begins = [answer.begin_in(text) for answer in answers]
    found = [(answer, begin) for answer, begin in zip(answers, begins, strict=True) if begin is not None]
    if len(found) == len(answers):
        return [(text, [span for answer, begin in found for span in answer.spans_in(text, begin, supervision)])]
    return [
        (answer.rendering, answer.spans_in(answer.rendering, len(answer.head + answer.opening), supervision))
        for answer in answers
    ]


def supervised(offsets: Sequence[tuple[int, int]], answers: Sequence[Answer]) -> list[bool]:
    """Per token, whether it lies within an answer. Of a marker that is cut off, no token counts.

    A token without characters stands where its offsets end, for what is between it and the token before it: offsets
    that are trimmed leave nothing of a token that is only spaces.
    """
    seen = offsets[-1][1] if offsets else 0
    offsets, mask = _with_spaces(offsets), [False] * len(offsets)
    for answer in answers:
        start, end = answer.start, answer.end if answer.end <= seen else answer.text_end
        # Tokens begin one after the other in the text.
        first, last = (bisect_left(offsets, place, key=_BEGIN) for place in (start, end))
        mask[first:last] = [start <= begin < stop <= end for begin, stop in offsets[first:last]]
    return mask


def _with_spaces(offsets: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    if all(begin < stop for begin, stop in offsets):
        return offsets
    found, before = [], 0
    for begin, stop in offsets:
        found.append((min(before, stop) if begin == stop else begin, stop))
        before = max(before, stop)
    return found


def last_run(mask: Sequence[int]) -> list[bool]:
    """The mask of the last supervised tokens that stand together: the last answer's, since each has a header."""
    end = max((index + 1 for index, flag in enumerate(mask) if flag), default=0)
    start = max((index + 1 for index in range(end) if not mask[index]), default=0)
    return [start <= index < end for index in range(len(mask))]


def _reply(
    prompt: str,
    whole: str,
    message: Mapping[str, Any],
    index: int,
    fmt: ConversationFormat,
    openings: Openings,
    thinking: bool,
) -> Reply:
    tail = openings.of(thinking=thinking)
    # A turn that goes on after a tool's result has no header of its own: the whole prompt comes before the answer.
    head = prompt[: len(prompt) - len(tail)] if prompt.endswith(fmt.assistant_start + tail) else prompt
    if not whole.startswith(head):
        raise DataError(
            "The chat template does not render an answer right after its prompt",
            found=repr(whole[: len(head)][-60:]),
            expected=repr(head[-60:]),
        )
    own = whole[len(head) :]
    written = [each for each in (openings.without_thinking, openings.with_thinking) if own.startswith(each)]
    opening, added = max(written, key=len, default=""), 0
    if not opening and head is not prompt and _skips_thinking(own, message, openings, thinking):
        opening, added = tail, len(tail)
    else:
        own = own[len(opening) :]
    text_end, end = _last_marker(own, fmt.assistant_ends)
    if end < 0 or own[end:].strip():
        raise DataError(
            "An answer has no end marker in the chat template's rendering",
            found=repr(own[-60:]),
            expected=" or ".join(map(repr, fmt.assistant_ends)),
        )
    return Reply(
        head=head,
        opening=opening,
        text=own[:text_end],
        marker=own[text_end:end],
        rest=own[end:],
        added=added,
        index=index,
        lost=_lost(own[:text_end], message, opening),
    )


def _lost(text: str, message: Mapping[str, Any], opening: str) -> str | None:
    """What is missing of the message in the text, be its thinking a field of its own or the begin of its content."""
    thinking, content = "the thinking of an answer", message["content"].strip()
    if message.get("reasoning_content", "").strip() not in text:
        return thinking
    if Written(opening + text).has_spelled(content):
        return None
    return thinking if text.strip() and content.endswith(text.strip()) else "the content of an answer"


def _skips_thinking(own: str, message: Mapping[str, Any], openings: Openings, thinking: bool) -> bool:
    """Whether the answer would follow the opening that says so, which the template leaves out when it looks back."""
    if thinking or openings.without_thinking == openings.with_thinking or message.get("reasoning_content"):
        return False
    begins_thinking = openings.without_thinking.partition("\n")[0]
    return not own.startswith(begins_thinking)


def _last_marker(text: str, markers: Sequence[str]) -> tuple[int, int]:
    begin, end = -1, -1
    for marker in markers:
        at = text.rfind(marker)
        if at >= 0 and at + len(marker) > end:
            begin, end = at, at + len(marker)
    return begin, end
