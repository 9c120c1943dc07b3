"""Rows of instruction, input and output, as Stanford's Alpaca has them, and of one question and its answer.

Knows which texts become which messages. Does not know other shapes of rows, or what a message may hold (messages.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from deepspec_core.data.messages import listed
from deepspec_core.errors import DataError

INSTRUCTION: Final = "instruction"
# An instruction alone may belong to another form, which says the rest of its question under other names.
_BESIDE: Final = ("input", "output")
ALPACA: Final = (INSTRUCTION, *_BESIDE, "history")
_BLANK_LINE: Final = "\n\n"


def is_alpaca(row: Mapping[str, Any]) -> bool:
    """Whether the row has an instruction, and beside it an input or an output, empty or not."""
    return bool(row.get(INSTRUCTION)) and any(name in row for name in _BESIDE)


def alpaca_messages(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of such a row, `history` ([[question, answer], ...]) included. Raises DataError for others."""
    messages: list[dict[str, Any]] = []
    for index, pair in enumerate(listed(row.get("history") or [], "history", where)):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(
                "history is not a list of pairs",
                where=f"{where} history[{index}]",
                found=repr(pair)[:80],
                expected="[question, answer]",
            )
        messages += asked_and_answered(pair[0], None, pair[1])
    return messages + asked_and_answered(row[INSTRUCTION], row.get("input"), row.get("output"))


def asked_and_answered(question: Any, more: Any, answer: Any) -> list[dict[str, Any]]:
    """A user's message, `more` after a blank line, and the answer. What is empty is left out."""
    parts = [part for part in (question, more) if part]
    # What is no text stays what it is, and is refused as such.
    asked = _BLANK_LINE.join(parts) if all(isinstance(part, str) for part in parts) else parts
    return [{"role": "user", "content": asked}, *([{"role": "assistant", "content": answer}] if answer else [])]
