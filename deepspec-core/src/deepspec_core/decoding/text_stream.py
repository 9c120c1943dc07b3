"""The text of token ids as they arrive, in whole characters.

Knows a function from ids to text. Does not know where ids come from, or what happens to the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Takes ids one by one. `push` returns the text that has become complete; "" while a character is incomplete.

    The pieces and the `rest` together are the text of all ids. Each piece is decoded with the ids of the piece before
    it, because a tokenizer may write an id differently after another one (a leading space). If the ids end inside a
    character, a tokenizer with byte tokens may also spoil the characters before it when it decodes them all at once.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # how many of the ids have been returned as text

    def push(self, token: int) -> str:
        """The text that this id completes."""
        self._ids.append(token)
        text, before = self._decode(self._ids), self._decode(self._ids[: self._shown])
        if len(text) <= len(before) or text.endswith(_INCOMPLETE):
            return ""
        # The ids just returned are kept as context for the next. Earlier ids are not needed any more.
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]

    def rest(self) -> str:
        """The rest of the text when no more ids come: a character that is incomplete."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]
