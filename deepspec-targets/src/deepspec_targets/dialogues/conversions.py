"""Unit conversions in steps: whole units to smaller ones, with or without a rest, and back again.

This file knows a few pairs of units and how to multiply by their factor in the head. It knows no other arithmetic.
"""

from dataclasses import dataclass
from random import Random
from typing import Final

from deepspec_targets.dialogues.arithmetic import hops
from deepspec_targets.dialogues.exercise import Exercise, Kind, templates


@dataclass(frozen=True)
class Units:
    """A unit, the smaller unit it is made of, how many, and the largest amount that exercises use."""

    big: str
    small: str
    factor: int
    most: int
    one: str


UNITS: Final = (
    Units("hours", "minutes", 60, 12, "hour"),
    Units("minutes", "seconds", 60, 12, "minute"),
    Units("days", "hours", 24, 9, "day"),
    Units("weeks", "days", 7, 12, "week"),
    Units("feet", "inches", 12, 12, "foot"),
    Units("meters", "centimeters", 100, 60, "meter"),
    Units("kilometers", "meters", 1000, 60, "kilometer"),
    Units("kilograms", "grams", 1000, 60, "kilogram"),
    Units("liters", "milliliters", 1000, 60, "liter"),
    Units("euros", "cents", 100, 60, "euro"),
)
BY_NAMES: Final = {(units.big, units.small): units for units in UNITS}

WHOLE: Final = templates(
    "Convert {n:d} {big} to {small}.",
    "How many {small} are {n:d} {big}?",
    "What is {n:d} {big} in {small}?",
    "Express {n:d} {big} in {small}.",
    "I have {n:d} {big}. How many {small} is that?",
    "Please turn {n:d} {big} into {small}.",
)
MIXED: Final = templates(
    "Convert {n:d} {big} and {r:d} {small} to {small}.",
    "How many {small} are {n:d} {big} and {r:d} {small}?",
    "What is {n:d} {big} and {r:d} {small} in {small}?",
    "Express {n:d} {big} and {r:d} {small} in {small}.",
    "I have {n:d} {big} and {r:d} {small}. How many {small} is that?",
    "Please turn {n:d} {big} and {r:d} {small} into {small}.",
)


def _multiply(n: int, units: Units) -> str:
    """One line that multiplies by the factor the way one does in the head."""
    factor = units.factor
    if factor in (7, 100, 1000):
        return f"{n} x {factor} = {n * factor}"
    if factor == 60:
        return f"{n} x 6 = {n * 6}, so {n} x 60 = {n * 60}"
    tens, ones = factor // 10 * 10, factor % 10
    told, _ = hops(n * tens, n * ones)
    return f"{n} x {tens} = {n * tens}, {n} x {ones} = {n * ones}, {told}"


def _down(rng: Random) -> Exercise:
    units = rng.choice(UNITS)
    n = rng.randint(2, units.most)
    mixed = rng.random() < 0.75
    r = rng.randint(1, units.factor - 1) if mixed else 0
    template = rng.choice(MIXED if mixed else WHOLE)

    def answer(rng: Random) -> str:
        lines = [
            rng.choice(
                (
                    f"One {units.one} has {units.factor} {units.small}.",
                    f"1 {units.one} = {units.factor} {units.small}.",
                    f"There are {units.factor} {units.small} in one {units.one}.",
                )
            ),
            f"{_multiply(n, units)}.",
        ]
        total, amount = n * units.factor, f"{n} {units.big}"
        if r:
            told, total = hops(total, r)
            lines.append(f"{rng.choice(('Now add the rest', f'Add {r}', 'And the rest'))}: {told}.")
            amount += f" and {r} {units.small}"
        lines.append(
            rng.choice(
                (
                    f"So {amount} are {total} {units.small}.",
                    f"So the answer is {total} {units.small}.",
                    f"That makes {total} {units.small}.",
                )
            )
        )
        return "\n".join(lines)

    values = {"n": n, "r": r, "big": units.big, "small": units.small}
    return Exercise(template.fill(values), answer)


def _up(rng: Random) -> Exercise:
    units = rng.choice(UNITS)
    n = rng.randint(2, units.most)
    total = n * units.factor

    def answer(rng: Random) -> str:
        last = rng.choice((f"So {total} {units.small} are {n} {units.big}.", f"So the answer is {n} {units.big}."))
        return f"{units.factor} {units.small} are one {units.one}.\n{total} / {units.factor} = {n}.\n{last}"

    values = {"n": total, "big": units.small, "small": units.big}
    return Exercise(rng.choice(WHOLE).fill(values), answer)


def draw(rng: Random) -> Exercise:
    """A conversion, mostly to the smaller unit."""
    return _down(rng) if rng.random() < 0.85 else _up(rng)


def result(prompt: str) -> int | None:
    """The amount a conversion comes to, in the unit asked for."""
    for template in (*MIXED, *WHOLE):
        if (found := template.read(prompt)) is None:
            continue
        n = int(found["n"])
        if (units := BY_NAMES.get((found["big"], found["small"]))) is not None:
            return n * units.factor + int(found.get("r", 0))
        if (units := BY_NAMES.get((found["small"], found["big"]))) is not None and n % units.factor == 0:
            return n // units.factor
    return None


CONVERSION: Final = Kind("conversion", 0.14, draw, result)
