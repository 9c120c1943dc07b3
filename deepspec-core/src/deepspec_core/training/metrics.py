"""Training figures. Each is a ratio of sums: the sums add up over steps, and are divided when a line is written.

Knows names, numerators, denominators, and the file they are written to. Does not know what they mean, or ranks.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from deepspec_core.disk import in_words

T = TypeVar("T")


def at_a_glance(line: Mapping[str, Any]) -> dict[str, float | str]:
    """The figures of a line that the progress line shows besides steps and time, by their names there."""
    shown: dict[str, float | str] = {"loss": line["loss"]} if "loss" in line else {}
    tau = line.get("tau_probabilistic", line.get("tau_greedy"))
    if tau is not None:
        shown["accepted length (estimated)"] = tau
    if "tokens_per_second" in line:
        shown["speed"] = f"{line['tokens_per_second']:,.0f} tokens/s"
    if "peak_memory_bytes" in line:
        shown["memory"] = in_words(line["peak_memory_bytes"])
    return shown


class Figures:
    """The sums since the last line, on the host.

    They are part of a checkpoint, so a resumed run writes the same lines.
    """

    def __init__(self, sums: Mapping[str, Sequence[float]] | None = None) -> None:
        self.sums: dict[str, list[float]] = {name: list(pair) for name, pair in (sums or {}).items()}

    def add(self, names: Sequence[str], values: Sequence[float]) -> None:
        """Add up. `values` holds the numerator and the denominator of each name, in turn."""
        for name, numerator, denominator in zip(names, values[::2], values[1::2], strict=True):
            pair = self.sums.setdefault(name, [0.0, 0.0])
            pair[0] += numerator
            pair[1] += denominator

    def take(self) -> dict[str, float]:
        """The ratios; then all sums are 0 again. A ratio whose denominator is 0 is left out."""
        ratios = {name: above / below for name, (above, below) in self.sums.items() if below}
        self.sums = {}
        return ratios


class MetricsLog:
    """metrics.jsonl: one JSON object in each line, with rising `step`."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Lines after step `resume_at`, which will be written again, and lines that cannot be read are removed."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._replace([line for line in self._lines() if _step(line) <= resume_at])

    def last(self) -> dict[str, Any]:
        """The newest line; empty if there is none."""
        written = self._lines()
        newest: dict[str, Any] = json.loads(written[-1]) if written else {}
        return newest

    def of_step(self, step: int) -> dict[str, Any]:
        """The line of a step; empty if it has none."""
        found: dict[str, Any] = next((json.loads(line) for line in self._lines() if _step(line) == step), {})
        return found

    def write(self, figures: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def add(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add figures to the line of a step. Nothing changes if the step has no line, or its line has them already."""
        before = self.of_step(step)
        if before and not figures.keys() <= before.keys():
            added = json.dumps({**before, **figures}).encode()
            self._replace([added if _step(line) == step else line for line in self._lines()])

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines() if self.path.exists() else []

    def _replace(self, lines: Sequence[bytes]) -> None:
        new = self.path.with_name(f".{self.path.name}.new")
        new.write_bytes(b"".join(line + b"\n" for line in lines))
        os.replace(new, self.path)


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


class Clock:
    """Counts sequences and all their tokens, supervised or not, per second since the last line, and the time that the
    training process waited for micro-batches."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._start, self._sequences, self._tokens, self._waited = time.monotonic(), 0, 0, 0.0

    def count(self, sequences: int, tokens: int) -> None:
        self._sequences += sequences
        self._tokens += tokens

    def waiting(self, loader: Iterator[T]) -> Iterator[T]:
        """Pass on the items of `loader`, and count the time until each arrives as waiting."""
        while True:
            asked = time.monotonic()
            try:
                item = next(loader)
            except StopIteration:
                return
            self._waited += time.monotonic() - asked
            yield item

    def rates(self) -> dict[str, float]:
        """The speeds for metrics.jsonl, and `loader_wait`: the share of the time that was waited for micro-batches.

        Then counting starts again.
        """
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        rates = {
            "tokens_per_second": self._tokens / seconds,
            "sequences_per_second": self._sequences / seconds,
            "loader_wait": round(self._waited / seconds, 4),
        }
        self.restart()
        return rates
