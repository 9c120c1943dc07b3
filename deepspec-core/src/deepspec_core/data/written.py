"""Whether a text says what it is asked for, however a chat template spells it.

Templates trim, indent, quote and write JSON, so parts are compared by their letters and digits. Knows texts; neither
messages nor templates.
"""

from __future__ import annotations

import json
from functools import cached_property


class Written:
    """A rendered text, asked for parts. Most stand in it as they are; letters are looked at only where one does not."""

    def __init__(self, text: str) -> None:
        self._text = text

    def has(self, part: str) -> bool:
        """By its letters and digits; a part without any by its signs, in whatever space."""
        if part.strip() in self._text:
            return True
        letters = _letters(part)
        return letters in self._letters if letters else _signs(part) in self._signs

    def has_spelled(self, part: str) -> bool:
        """As it is, or as JSON writes it, where line breaks become letters and letters may become numbers."""
        if self.has(part):
            return True
        spellings = (json.dumps(part, ensure_ascii=False), json.dumps(part))
        if _letters(part):
            return any(map(self.has, spellings))
        return any(_signs(spelling[1:-1]) in self._signs for spelling in spellings)

    @cached_property
    def _letters(self) -> str:
        return _letters(self._text)

    @cached_property
    def _signs(self) -> str:
        return _signs(self._text)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).casefold()


def _signs(text: str) -> str:
    return "".join(text.split())
