"""The small vocabulary that all kinds of exercise share: names, places, things, colours.

It is kept small on purpose. The tiny target has about a thousand tokens, and a word it meets often becomes a single
token of its own.
"""

from random import Random
from typing import Final

NAMES: Final = (
    "Mia",
    "Tom",
    "Anna",
    "Ben",
    "Lena",
    "Max",
    "Nora",
    "Paul",
    "Ella",
    "Leo",
    "Sara",
    "Finn",
    "Adam",
    "Ruth",
)

CITIES: Final = ("Oslo", "Paris", "Rome", "Lima", "Cairo", "Berlin", "Madrid", "Vienna", "Tokyo", "Dublin")

THINGS: Final = ("apples", "books", "stamps", "pencils", "cards", "coins", "shells", "plums", "buttons", "tickets")

COLOURS: Final = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")

DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

HOBBIES: Final = ("chess", "music", "football", "painting", "cooking", "reading", "tennis", "dancing")

JOBS: Final = ("teacher", "doctor", "baker", "pilot", "farmer", "nurse")

FOODS: Final = ("rice", "beans", "bread", "cheese", "eggs", "potatoes", "tomatoes", "onions", "carrots", "noodles")


def two(rng: Random, pool: tuple[str, ...]) -> tuple[str, str]:
    """Two different entries of a pool."""
    first, second = rng.sample(pool, 2)
    return first, second


def article(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def listed(words: list[str]) -> str:
    """Words as an English list: "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
