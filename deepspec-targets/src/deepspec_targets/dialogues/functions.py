"""Small Python functions from a description.

This file knows a handful of tasks and, for most of them, two equally good ways to write the function. It never runs
the code it writes.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from deepspec_targets.dialogues.exercise import Exercise, Kind

COMPARISONS: Final = (
    ("greater than", ">"),
    ("less than", "<"),
    ("at least", ">="),
    ("at most", "<="),
    ("not equal to", "!="),
)
LISTS: Final = ("numbers", "values", "items", "prices", "scores", "ages")
VERBS: Final = ("get", "find", "take", "make", "pick")

# A task is what the function does, its name, its parameter, and the bodies it may have.
Task = tuple[str, str, str, list[list[str]]]


def _keep(rng: Random) -> Task:
    words, sign = rng.choice(COMPARISONS)
    limit, values = rng.randint(1, 99), rng.choice(LISTS)
    return (
        f"keeps the {values} that are {words} {limit}",
        f"{rng.choice(VERBS)}_{values}",
        values,
        [
            [f"return [x for x in {values} if x {sign} {limit}]"],
            ["kept = []", f"for x in {values}:", f"    if x {sign} {limit}:", "        kept.append(x)", "return kept"],
        ],
    )


def _count(rng: Random) -> Task:
    words, sign = rng.choice(COMPARISONS)
    limit, values = rng.randint(1, 99), rng.choice(LISTS)
    return (
        f"counts the {values} that are {words} {limit}",
        f"count_{values}",
        values,
        [
            [f"return sum(1 for x in {values} if x {sign} {limit})"],
            ["count = 0", f"for x in {values}:", f"    if x {sign} {limit}:", "        count += 1", "return count"],
        ],
    )


def _scale(rng: Random) -> Task:
    factor, shift, plus = rng.randint(2, 20), rng.randint(1, 50), rng.random() < 0.5
    value = rng.choice(("x", "n", "price", "value", "size"))
    sign = "+" if plus else "-"
    return (
        f"multiplies {value} by {factor} and {'adds' if plus else 'subtracts'} {shift}",
        f"{rng.choice(VERBS)}_{'result' if value in 'xn' else value}",
        value,
        [
            [f"return {value} * {factor} {sign} {shift}"],
            [f"result = {value} * {factor}", f"return result {sign} {shift}"],
        ],
    )


def _total(rng: Random) -> Task:
    step, values = rng.randint(2, 30), rng.choice(LISTS)
    return (
        f"adds up the {values} that can be divided by {step}",
        f"sum_{values}",
        values,
        [
            [f"return sum(x for x in {values} if x % {step} == 0)"],
            ["total = 0", f"for x in {values}:", f"    if x % {step} == 0:", "        total += x", "return total"],
        ],
    )


def _letters(rng: Random) -> Task:
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
    text = rng.choice(("text", "word", "name", "line"))
    return (
        f"counts the letter {letter} in a {text}",
        f"count_{letter}",
        text,
        [
            [f'return {text}.count("{letter}")'],
            ["count = 0", f"for c in {text}:", f'    if c == "{letter}":', "        count += 1", "return count"],
        ],
    )


def _slice(rng: Random) -> Task:
    count, values, first = rng.randint(2, 40), rng.choice(LISTS), rng.random() < 0.5
    side = "first" if first else "last"
    part = f"{values}[:{count}]" if first else f"{values}[-{count}:]"
    return (
        f"returns the {side} {count} {values}",
        f"{side}_{values}",
        values,
        [[f"return {part}"], [f"result = {part}", "return result"]],
    )


def _map(rng: Random) -> Task:
    values, number = rng.choice(LISTS), rng.randint(2, 60)
    words, sign = rng.choice((("adds {} to", "+"), ("multiplies by {}", "*"), ("takes {} from", "-")))
    return (
        f"{words.format(number)} each of the {values}",
        f"change_{values}",
        values,
        [
            [f"return [x {sign} {number} for x in {values}]"],
            ["result = []", f"for x in {values}:", f"    result.append(x {sign} {number})", "return result"],
        ],
    )


def _check(rng: Random) -> Task:
    low, value = rng.randint(0, 50), rng.choice(("x", "n", "price", "age", "score"))
    high = low + rng.randint(1, 50)
    return (
        f"checks if {value} is between {low} and {high}",
        f"check_{value}",
        value,
        [
            [f"return {low} <= {value} <= {high}"],
            [f"if {value} < {low}:", "    return False", f"return {value} <= {high}"],
        ],
    )


TASKS: Final[tuple[Callable[[Random], Task], ...]] = (_keep, _count, _scale, _total, _letters, _slice, _map, _check)


def draw(rng: Random) -> Exercise:
    """A function to write."""
    does, name, parameter, bodies = rng.choice(TASKS)(rng)
    named = rng.random() < 0.6
    asked = f" {name}" if named else ""
    prompt = rng.choice(
        (
            f"Write a Python function{asked} that {does}.",
            f"Please write a function{asked} in Python that {does}.",
            f"I need a Python function{asked}. It {does}.",
            f"Can you code a Python function{asked} that {does}?",
        )
    )

    def answer(rng: Random) -> str:
        opener = rng.choice(("Here is the function:", "Sure:", "Of course, here it is:", f"This function {does}:"))
        lines = [f"def {name}({parameter}):"]
        if rng.random() < 0.4:
            lines.append(f'    """{does[0].upper()}{does[1:]}."""')
        lines += [f"    {line}" for line in rng.choice(bodies)]
        closer = rng.choice(
            ("", "", f"\n\nCall {name} with your {parameter}.", f"\n\nThe parameter {parameter} is not changed.")
        )
        return "\n".join([opener, "", "```python", *lines, "```"]) + closer

    return Exercise(prompt, answer)


CODE: Final = Kind("code", 0.11, draw)
