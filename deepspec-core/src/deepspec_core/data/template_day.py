"""The date that chat templates get: always the same one, so that the same run renders the same tokens every day.

Some templates write today's date into the system message. They ask `strftime_now`, a function that transformers gives
them and that no argument can replace. So a macro of that name is put before them. Knows Jinja and dates; no tokenizer.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

# The date that a widely used template writes if it cannot get today's.
DAY: Final = datetime(2024, 7, 26)
_NAME: Final = "strftime_now"
_LETTERS: Final = "aAbBcdHIjmMpSuUVwWxXyYGzZ"
_WORDS: Final = {
    **{f"%{letter}": DAY.strftime(f"%{letter}") for letter in _LETTERS},
    **{f"%-{letter}": DAY.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dHIjmMSyUVW"},
}
_REPLACED: Final = "".join(f"|replace('{code}', '{word}')" for code, word in _WORDS.items())
# One line, whose end transformers leaves out after a block: what follows is rendered as if it stood alone.
_MACRO: Final = (
    f"{{% macro {_NAME}(format) %}}"
    "{% for part in format.split('%%') %}{{ '' if loop.first else '%' }}{{ part" + _REPLACED + " }}{% endfor %}"
    "{% endmacro %}\n"
)


def asks_for_the_day(source: str) -> bool:
    """Whether a template asks for today's date."""
    return _NAME in source


def told_the_day(source: str) -> str:
    """The template with DAY as today's date. The text is unchanged if the template does not ask for the date."""
    return _MACRO + source if asks_for_the_day(source) else source


def without_the_day(line: int, source: str) -> int:
    """The line of `source` that is this one of `told_the_day(source)`."""
    return line - asks_for_the_day(source)
