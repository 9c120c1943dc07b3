"""Finds how many requests one server should have at once: as many as raise its tokens per second, and no more.

The level doubles as long as that brings a clear gain, then stays at the smaller of the last two levels. It halves if
the server reports that it is busy. Knows times and counts; knows no requests.
"""

from __future__ import annotations

from typing import Final

from attrs import define

START: Final = 8
# Less than this is within the noise of answers of different length.
_GAIN: Final = 1.05
# Answers in a measurement, for each request at once. The first of them were begun at the level before.
_WINDOW: Final = 2
# Measurements after which a settled level is tried again: load and lengths change.
_AGAIN: Final = 16


@define
class Level:
    """Ask `value`, and tell it of every answer."""

    most: int
    value: int = START
    _tokens: int = 0
    _answers: int = 0
    _since: float | None = None
    _best: float = 0.0
    _settled: int = 0
    _before: int = START

    def __attrs_post_init__(self) -> None:
        self.value = self._before = min(self.value, self.most)

    def answered(self, tokens: int, now: float) -> None:
        """An answer of so many tokens came at `now`, in seconds."""
        self._answers += 1
        if self._answers <= self.value:  # begun before the level was this one
            self._since = now
            return
        self._tokens += tokens
        if self._answers < (1 + _WINDOW) * self.value or self._since is None or now <= self._since:
            return
        self._measured(self._tokens / (now - self._since))

    def busy(self) -> None:
        """The server has too much to do."""
        self._begin(max(1, self.value // 2))
        self._settled = _AGAIN

    def _measured(self, rate: float) -> None:
        if self._settled:
            self._settled -= 1
            self._best = rate
            self._begin(self.value if self._settled else self._raised())
        elif rate > self._best * _GAIN and self.value < self.most:
            self._best = rate
            self._begin(self._raised())
        else:
            self._settled = _AGAIN
            self._begin(self.value if rate > self._best * _GAIN else self._before)

    def _raised(self) -> int:
        self._before = self.value
        return min(self.most, self.value * 2)

    def _begin(self, value: int) -> None:
        self.value, self._tokens, self._answers, self._since = value, 0, 0, None
