"""A chat template of the user's own, read from a file in place of the target's.

Knows files. Does not know Jinja, tokenizers, nor which markers a family's template writes.
"""

from __future__ import annotations

from pathlib import Path

from deepspec_core.errors import TargetError


def read_chat_template(path: Path) -> str:
    """The template's text. TargetError if the file cannot be read, or says nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(
            "the chat template cannot be read",
            where=path,
            found=error.strerror if isinstance(error, OSError) else error,
            expected="a Jinja file, in UTF-8",
        ) from error
    if not text.strip():
        raise TargetError("the chat template is empty", where=path, expected="a Jinja file that renders messages")
    return text
