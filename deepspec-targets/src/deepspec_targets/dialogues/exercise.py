"""What an exercise is: a prompt, ways to answer it, and for some kinds the one right result.

This file knows how prompts are filled in from templates and read back again, so that an answer can be checked from
the prompt's text alone. It knows no subject: the kinds of exercise live in files of their own.
"""

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random


@dataclass(frozen=True)
class Exercise:
    """One prompt and a writer of answers to it; the writer draws its wording from the generator it is given."""

    prompt: str
    answer: Callable[[Random], str]


@dataclass(frozen=True)
class Kind:
    """A family of exercises: how often it is drawn, how one is made, and the result its prompts ask for.

    `result` reads a prompt and returns the number asked for, or None where the text is no prompt of this kind. Kinds
    without a single right answer have no `result`.
    """

    name: str
    weight: float
    draw: Callable[[Random], Exercise]
    result: Callable[[str], int | None] | None = None


@dataclass(frozen=True)
class Template:
    """A sentence with named gaps that can be filled and read back.

    Gaps written `{a:d}` hold whole numbers, all others hold words. A gap may occur more than once.
    """

    text: str

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The regular expression that reads the gaps back from a filled-in sentence."""
        parts: list[str] = []
        seen: set[str] = set()
        for literal, name, spec, _ in string.Formatter().parse(self.text):
            parts.append(re.escape(literal))
            if name is None:
                continue
            if name in seen:
                parts.append(f"(?P={name})")
            else:
                seen.add(name)
                parts.append(f"(?P<{name}>{r'[0-9]+' if spec == 'd' else r'[A-Za-z ]+?'})")
        return re.compile("".join(parts))

    def fill(self, values: Mapping[str, object]) -> str:
        """The sentence with its gaps filled; values without a gap are ignored."""
        return self.text.format(**values)

    def read(self, text: str) -> dict[str, str] | None:
        """The values of the gaps in a filled-in sentence, or None if the text is another sentence."""
        found = self.pattern.fullmatch(text)
        return None if found is None else found.groupdict()


def templates(*texts: str) -> tuple[Template, ...]:
    """Several templates at once."""
    return tuple(Template(text) for text in texts)


def final_number(answer: str) -> int | None:
    """The last whole number in an answer, which is where every worked answer puts its result."""
    numbers = re.findall(r"(?<![0-9])-?[0-9]+", answer)
    return int(numbers[-1]) if numbers else None
