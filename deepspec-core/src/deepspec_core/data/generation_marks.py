"""The {% generation %} marks of a chat template, with which its author marks the text to supervise.

The marks produce no output. To find their places, each is replaced by a sign that occurs in no text, together with the
white space that Jinja removes around a block. Jinja decides which marks are blocks: in a comment, a string or a raw
section a mark is only text. Knows a template's source and its renderings; does not know how it is run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from deepspec_core.data.answers import Answer

# Two code points that Unicode keeps free of characters.
_BEGIN: Final = "\ufdd0"
_END: Final = "\ufdd1"
_TAG: Final = re.compile(
    r"(?P<indent>^[ \t]*)?\{%(?P<left>[-+]?)\s*(?P<kind>(?:end)?generation)\s*(?P<right>[-+]?)%\}(?P<newline>\n?)",
    re.MULTILINE,
)


@lru_cache(maxsize=8)  # asked for every row, of few templates
def with_signs(source: str) -> str:
    """The template with a sign in place of each mark; unchanged if it has no marks, or is not a Jinja template."""
    written = source.replace("\r\n", "\n").replace("\r", "\n")  # as Jinja reads it
    places = _marks(written)

    def sign(tag: re.Match[str]) -> str:
        if tag.start("kind") not in places:
            return tag[0]
        left, right = tag["left"], tag["right"]
        mark = _BEGIN if tag["kind"] == "generation" else _END
        return (
            (tag["indent"] or "" if left == "+" else "")
            + ("{{-" if left == "-" else "{{")
            + f" '{mark}' "
            + ("-}}" if right == "-" else "}}")
            + (tag["newline"] if right == "+" else "")
        )

    return _TAG.sub(sign, written) if places else source


def _marks(source: str) -> set[int]:
    """Where the names of its blocks for marks begin."""
    from jinja2 import Environment, TemplateSyntaxError

    if _TAG.search(source) is None:
        return set()
    places, at, last = set(), 0, ""
    try:
        for _, kind, value in Environment().lex(source):
            # White space that a block removes is in no lexeme, and no lexeme after it begins with white space.
            at = source.index(value, at)
            if kind == "name" and last == "block_begin" and value in ("generation", "endgeneration"):
                places.add(at)
            at += len(value)
            last = last if kind == "whitespace" else kind
    except TemplateSyntaxError:
        return set()  # rendering says so
    return places


def marked_spans(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendering of such a template without the signs, and the characters [begin, end) between them."""
    text, spans, begin = "", [], 0
    for piece in re.split(f"({_BEGIN}|{_END})", rendered):
        if piece == _BEGIN:
            begin = len(text)
        elif piece == _END:
            spans.append((begin, len(text)))
        else:
            text += piece
    return text, spans


def within(answers: Sequence[Answer], marks: Sequence[tuple[int, int]]) -> list[Answer]:
    """What of the answers stands between marks."""
    found = []
    for answer in answers:
        for begin, stop in marks:
            start, end = max(answer.start, begin), min(answer.end, stop)
            if start < end:
                found.append(Answer(start=start, text_end=max(start, min(answer.text_end, end)), end=end))
    return found
