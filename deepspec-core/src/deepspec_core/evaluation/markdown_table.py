"""Tables for Markdown. Knows text; not what it says."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, whose cells are set literally."""
    return [_row(headings), "|" + "---|" * len(headings), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    literal = (" ".join(cell.split()).replace("|", r"\|").replace("*", r"\*") for cell in cells)
    return "| " + " | ".join(literal) + " |"
