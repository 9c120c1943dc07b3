"""Strings that end an answer, found in its text as tokens arrive, also where a string spans several of them.

An output ends with the token that completes one of the strings. Its text ends before that string, as served texts do.
Knows a function from ids to text. Does not know where ids come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import define, field, frozen

from deepspec_core.decoding.text_stream import TextStream


@frozen
class StopText:
    """The stop strings, none of them empty, and the function from ids to text."""

    stops: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def watch(self) -> Watch:
        """A watch over one new answer."""
        return Watch(self.stops, TextStream(self.decode))

    def cut(self, text: str) -> str:
        """The text before the first of the strings in it; all of it if there is none."""
        return cut(text, self.stops)


@define
class Watch:
    """A watch over one answer. It holds the end of the text in which a stop string may still begin."""

    stops: tuple[str, ...]
    stream: TextStream
    tail: str = ""

    def push(self, token: int) -> bool:
        """Whether the text has one of the strings, now that this id has come."""
        self.tail += self.stream.push(token)
        if any(stop in self.tail for stop in self.stops):
            return True
        self.tail = self.tail[len(self.tail) - _open(self.tail, self.stops) :]
        return False


@define
class Shown:
    """Decides how much of one answer's text may be shown: nothing that may begin a stop string, or that follows one."""

    stops: tuple[str, ...]
    held: str = ""
    ended: bool = field(default=False)

    def push(self, piece: str) -> str:
        """The text that may be shown, now that this piece has come."""
        if self.ended:
            return ""
        text = self.held + piece
        before = cut(text, self.stops)
        self.ended = len(before) < len(text)
        keep = 0 if self.ended else _open(text, self.stops)
        self.held = text[len(text) - keep :]
        return before if self.ended else text[: len(text) - keep]

    def rest(self) -> str:
        """The text that was held back, once no more pieces come."""
        return "" if self.ended else self.held


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the strings in it."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]


def _open(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of the text that begins one of the strings."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
