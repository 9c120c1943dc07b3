"""Append-only JSON lines that survive being killed.

Each entry is one line, flushed when written. A line without its newline is what a kill leaves behind: it is cut off
when the journal is opened, and whatever wrote it does that piece of work again. Knows nothing about what entries mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec_core.errors import DataError


class Journal:
    """Entries of one file, in order of writing. `entries` are those that stood when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.entries: list[dict[str, Any]] = []
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            self.entries.append(_entry(line, f"{path}:{number}"))
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one entry and flush it."""
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; the journal can be opened again."""
        self._file.close()


def _entry(line: bytes, where: str) -> dict[str, Any]:
    fix = "Remove that line and those after it; what they recorded is done again."
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("A line of a journal is not JSON", where=where, found=error, fix=fix) from error
    if not isinstance(entry, dict):
        raise DataError("A line of a journal is no object", where=where, found=type(entry).__name__, fix=fix)
    return entry
