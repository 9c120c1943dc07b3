"""The {% generation %} marks of a chat template: what its author wants to be supervised.

The marks write nothing. To see where they stand, each is replaced by a sign that no text has, with the white space
that Jinja removes around a block removed as well. Knows a template's source and its renderings; not how it is run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from deepspec_core.data.answers import Answer

# Two code points that Unicode keeps free of characters.
_BEGIN: Final = "\ufdd0"
_END: Final = "\ufdd1"
_TAG: Final = re.compile(
    r"(?P<indent>^[ \t]*)?\{%(?P<left>[-+]?)\s*(?P<kind>(?:end)?generation)\s*(?P<right>[-+]?)%\}(?P<newline>\n?)",
    re.MULTILINE,
)


def with_signs(source: str) -> str:
    """The template with a sign in place of each mark; itself where it has none."""

    def sign(tag: re.Match[str]) -> str:
        left, right = tag["left"], tag["right"]
        written = _BEGIN if tag["kind"] == "generation" else _END
        return (
            (tag["indent"] or "" if left == "+" else "")
            + ("{{-" if left == "-" else "{{")
            + f" '{written}' "
            + ("-}}" if right == "-" else "}}")
            + (tag["newline"] if right == "+" else "")
        )

    return _TAG.sub(sign, source)


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
