"""Tables for Markdown. This file does not know what the text means."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table. Cells are escaped, so that their text is shown literally."""
    return [_row(headings), "|" + "---|" * len(headings), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    literal = (" ".join(cell.split()).replace("|", r"\|").replace("*", r"\*") for cell in cells)
    return "| " + " | ".join(literal) + " |"
