"""How far a stage is: a bar with rate and time left on a terminal, otherwise a log line every ten seconds.

`now` gives it to whoever tells of this process. Knows counts and figures; not what is being done.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger("deepspec")

LOG_EVERY_SECONDS = 10.0

T = TypeVar("T")


# What is being done now: the outermost first. Others of this process ask `now` for it.
_GOING_ON: list[Progress] = []


def now() -> Progress | None:
    """The innermost progress that is shown by this process now."""
    return _GOING_ON[-1] if _GOING_ON else None


def duration(seconds: float) -> str:
    """Seconds as people read them: 0:07, 1:02:07."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress:
    """Use as a context manager: `with Progress(1000, "regenerate", "samples") as progress: progress.advance()`.

    `total` None: unknown. `done`: what an earlier, interrupted run finished; it is shown but not counted in the rate.
    `enabled` False (all ranks but the first): nothing is shown.
    """

    def __init__(self, total: int | None, what: str, unit: str, *, done: int = 0, enabled: bool = True) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = self._before = done
        self.figures: dict[str, float | str] = {}
        self._enabled = enabled
        self._bar: RichProgress | None = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        if self._enabled:
            _GOING_ON.append(self)
        if self._enabled and sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                self.what, total=self.total, completed=self.done, rate=f"- {self.unit}/s", figures=""
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in _GOING_ON:
            _GOING_ON.remove(self)
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled:
            log.info("%s", self.line())

    @property
    def rate(self) -> float:
        """Units a second of this run so far."""
        return (self.done - self._before) / max(time.monotonic() - self._start, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None where it cannot be said."""
        rate = self.rate
        return (self.total - self.done) / rate if self.total is not None and self.done < self.total and rate else None

    def advance(self, n: int = 1, **figures: float | str) -> None:
        """n more units are done; `figures` (a loss, a share, or text that says what it is) are shown until replaced."""
        self.done += n
        self.figures.update(figures)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self.done, rate=f"{self.rate:.3g} {self.unit}/s", figures=self._figures()
            )
        elif self._enabled and time.monotonic() - self._last_line >= LOG_EVERY_SECONDS:
            self._last_line = time.monotonic()
            log.info("%s", self.line())

    def line(self) -> str:
        """One line: what, done of total, rate, time left, figures."""
        total = f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"
        line = f"{self.what}: {total} {self.unit}, {self.rate:.3g} {self.unit}/s"
        if (left := self.seconds_left) is not None:
            line += f", {duration(left)} left"
        return ", ".join(filter(None, (line, self._figures())))

    def _figures(self) -> str:
        return ", ".join(
            value if isinstance(value, str) else f"{name} {value:.4g}" for name, value in self.figures.items()
        )


def track(iterable: Iterable[T], what: str, unit: str, *, total: int | None = None) -> Iterator[T]:
    """The items of `iterable`, one unit each, with progress shown; `total` defaults to its length where it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(total, what, unit) as progress:
        for item in iterable:
            yield item
            progress.advance()
