"""Tables for Markdown, and text that is shown literally. This file does not know what the text means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

# An underscore inside a word is one, and has no need to be escaped.
_SPECIAL: Final = re.compile(r"[\\`*<&\[~$|]|(?<!\w)_|_(?!\w)")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table. Cells are escaped, so that their text is shown literally."""
    return [_row(headings), "|" + "---|" * len(headings), *map(_row, rows)]


def literal(text: str) -> str:
    """The text on one line, with what Markdown or HTML would read as a mark escaped."""
    return _SPECIAL.sub(lambda found: "\\" + found.group(), " ".join(text.split()))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(literal, cells)) + " |"
