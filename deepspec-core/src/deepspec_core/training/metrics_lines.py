"""Reads metrics.jsonl, also while training writes it, after a kill, and after other people edited it.

A line that is not a JSON object with a whole `step`, or a half-written last line, is left out and counted. Values that
are not finite numbers are left out too. Knows lines; does not know what figures mean. Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

METRICS: Final = "metrics.jsonl"
# The accepted length of real speculative decoding on held-out prompts, at the steps that have it.
HELD_OUT_LENGTH: Final = "held_out/accepted_length"
Line = dict[str, float]
# A line has some hundred figures at most.
_LONGEST: Final = 1 << 20


def read_lines(path: Path) -> tuple[list[Line], int]:
    """All readable lines, and the number of others. No lines if there is no such file."""
    following = Following(path)
    return [line for _, line in following.new()], following.unreadable


def last_line(path: Path) -> Line | None:
    """The newest line that can be read, from the end of the file."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _LONGEST))
            found = file.read().split(b"\n")
    except OSError:
        return None
    lines = (figures_of(line) for line in reversed(found[:-1]))
    return next((line for line in lines if line is not None), None)


class Following:
    """The lines of a file that grows, is cut, or is replaced by a shorter one when a run resumes."""

    def __init__(self, path: Path) -> None:
        self.path, self.unreadable = path, 0
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._at = (0, 0)

    def new(self) -> Iterator[tuple[tuple[int, int], Line]]:
        """((step, n), line) of what was added since the last call: the n-th line of its step, counted from 1.

        Of a file that was replaced or cut, everything comes again.
        """
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                    self._file, self._offset, self._at, self.unreadable = (status.st_dev, status.st_ino), 0, (0, 0), 0
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for text in whole.split(b"\n")[:-1]:
            line = figures_of(text)
            if line is None:
                self.unreadable += 1
                continue
            step = int(line["step"])
            self._at = (step, self._at[1] + 1 if step == self._at[0] else 1)
            yield self._at, line


def figures_of(text: bytes) -> Line | None:
    """The figures of a line whose step is 0 or more; None for other lines."""
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or type(content.get("step")) is not int or content["step"] < 0:
        return None
    return {name: value for name, value in content.items() if _is_figure(value)}


def _is_figure(value: Any) -> bool:
    # A whole number of any length is JSON; what no float can hold is no figure.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)
