"""Text with half of a surrogate pair in it, as JSON can write it ("\\ud800"): no character, and nothing encodes it.

Knows values that JSON can hold. Does not know rows, templates or tokenizers.
"""

from __future__ import annotations

import json
from typing import Any, Final

_TEXT: Final = json.JSONEncoder(ensure_ascii=False)


def not_unicode(*values: Any) -> str | None:
    """The first invalid character in the texts of these values, in words; None if all can be encoded as UTF-8."""
    try:
        _TEXT.encode(values).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair, {error.object[error.start]!r}"
    return None


def printable(text: str) -> str:
    """The text with invalid characters written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
