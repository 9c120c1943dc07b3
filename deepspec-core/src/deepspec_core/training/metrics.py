"""Training figures: ratios of sums, added over steps and divided when a line is written.

Knows names, numerators and denominators, and the file they go to; not what they mean, nor ranks.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Figures:
    """Ratios since the last line, on the host; part of a checkpoint, so that a resumed run writes the same lines."""

    def __init__(self, sums: Mapping[str, Sequence[float]] | None = None) -> None:
        self.sums: dict[str, list[float]] = {name: list(pair) for name, pair in (sums or {}).items()}

    def add(self, names: Sequence[str], values: Sequence[float]) -> None:
        """`values` holds numerator and denominator of each name, in turn."""
        for name, numerator, denominator in zip(names, values[::2], values[1::2], strict=True):
            pair = self.sums.setdefault(name, [0.0, 0.0])
            pair[0] += numerator
            pair[1] += denominator

    def take(self) -> dict[str, float]:
        """The ratios, and start over; a ratio over nothing is left out."""
        ratios = {name: above / below for name, (above, below) in self.sums.items() if below}
        self.sums = {}
        return ratios


class MetricsLog:
    """metrics.jsonl: one JSON object a line, with rising `step`."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Lines past `resume_at` steps, and a half-written last line, are removed: they will be written again."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= resume_at]
            shortened = path.with_name(f".{path.name}.new")
            shortened.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(shortened, path)

    def last(self) -> dict[str, Any]:
        """The newest line; empty where there is none."""
        written = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        newest: dict[str, Any] = json.loads(written[-1]) if written else {}
        return newest

    def write(self, figures: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Clock:
    """Sequences and tokens (of whole sequences, supervised or not) a second since the last line."""

    def __init__(self) -> None:
        self._start, self._sequences, self._tokens = time.monotonic(), 0, 0

    def count(self, sequences: int, tokens: int) -> None:
        self._sequences += sequences
        self._tokens += tokens

    def rates(self) -> dict[str, float]:
        """What metrics.jsonl says of speed; starts over."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        rates = {"tokens_per_second": self._tokens / seconds, "sequences_per_second": self._sequences / seconds}
        self._start, self._sequences, self._tokens = now, 0, 0
        return rates
