"""Text of token ids as they come, without halves of characters.

Knows a function from ids to text; not where ids come from nor where the text goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """`push` ids one by one; each call returns the text that is complete now, "" while a character is incomplete.

    The pieces and the `rest` together are the text of all ids. Only the ids since the last piece but one are decoded
    again, because a tokenizer may write an id differently after another one (a leading space). Where the ids end inside
    a character, a tokenizer with byte tokens may spoil the characters before it too, when it decodes them all at once.
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
        # What was shown is kept as context of what comes next; what stood before it is not needed any more.
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What is left when no more ids come: a character that stayed incomplete."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]
