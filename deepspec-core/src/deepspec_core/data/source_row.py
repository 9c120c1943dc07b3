"""One row of a file: its place, and its value or the reason why it cannot be read.

Knows rows as values. Does not know files, or what a row must hold.
"""

from __future__ import annotations

from typing import Any, Final

from attrs import field, frozen

from deepspec_core.disk import in_words
from deepspec_core.errors import DataError
from deepspec_core.json_lines import json_value

# More text than any target reads: about two million tokens.
MOST_BYTES: Final = 8 * 2**20


@frozen
class SourceRow:
    """`where` is FILE:LINE, or FILE: row N. `error` says why a value is missing; `text` is then the row's text."""

    where: str
    value: Any = None
    error: DataError | None = field(default=None, kw_only=True)
    text: str = field(default="", kw_only=True)

    def content(self) -> Any:
        """The value. Raises DataError if there is none."""
        if self.error is not None:
            raise self.error
        return self.value


def of_json(text: bytes, where: str, *, size: int, most_bytes: int | None, what: str) -> SourceRow:
    """The row that this JSON text says. `size` is that of the whole row, of which `text` may be the beginning.

    `what` is the row's name in errors.
    """
    try:
        if most_bytes is not None and size > most_bytes:
            raise too_long(where, size, most_bytes)
        return SourceRow(where, json_value(text, where, what=what))
    except DataError as error:
        return SourceRow(where, error=error, text=text.strip().decode("utf-8", "backslashreplace"))


def too_long(where: str, size: int, most_bytes: int) -> DataError:
    """The error for a row that is longer than any conversation."""
    return DataError(
        "A row is too long", where=where, found=in_words(size), expected=f"at most {in_words(most_bytes)} per row"
    )
