"""Sums, differences and products, worked column by column, and short chains of plus and minus.

This file knows how a column calculation is told in words: every column repeats its digits, so nothing has to be kept
in mind between two lines. That is what lets a model of three million parameters get them right, and what makes the
answers predictable in long stretches. It knows nothing of stories or units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from deepspec_targets.dialogues.exercise import Exercise, Kind, Template, templates

COLUMNS: Final = ("Ones", "Tens", "Hundreds", "Thousands")

ADD: Final = templates(
    "What is {a:d} + {b:d}?",
    "Add {a:d} and {b:d}.",
    "Can you work out {a:d} + {b:d} step by step?",
    "{a:d} + {b:d} = ?",
    "Please find the sum of {a:d} and {b:d}.",
    "How much is {a:d} plus {b:d}?",
)
SUBTRACT: Final = templates(
    "What is {a:d} - {b:d}?",
    "Subtract {b:d} from {a:d}.",
    "Can you work out {a:d} - {b:d} step by step?",
    "{a:d} - {b:d} = ?",
    "Please find the difference between {a:d} and {b:d}.",
    "How much is {a:d} minus {b:d}?",
)
MULTIPLY: Final = templates(
    "What is {a:d} x {b:d}?",
    "Multiply {a:d} by {b:d}.",
    "Can you work out {a:d} x {b:d} step by step?",
    "{a:d} x {b:d} = ?",
    "Please find the product of {a:d} and {b:d}.",
    "How much is {a:d} times {b:d}?",
)
CHAIN_TEXTS: Final = ("What is {}?", "Work out {}.", "{} = ?", "How much is {}?")
CHAINS: Final = (
    ("{a:d} + {b:d} + {c:d}", 1, 1),
    ("{a:d} + {b:d} - {c:d}", 1, -1),
    ("{a:d} - {b:d} + {c:d}", -1, 1),
)
CHAIN_TEMPLATES: Final = tuple(
    (Template(text.format(chain)), second, third) for chain, second, third in CHAINS for text in CHAIN_TEXTS
)


@dataclass(frozen=True)
class Wording:
    """The turns of phrase that one answer keeps to from its first line to its last."""

    carry: str
    borrow: str

    @classmethod
    def draw(cls, rng: Random) -> "Wording":
        """One of the ways to speak of carrying and borrowing."""
        return cls(
            carry=rng.choice(("write {} and carry {}", "write {}, carry {}")),
            borrow=rng.choice(("borrow 10", "borrow ten")),
        )


def digits(number: int, columns: int) -> list[int]:
    """The digits of a number from the ones upwards, padded with zeros."""
    return [number // 10**place % 10 for place in range(columns)]


def sum_columns(a: int, b: int, wording: Wording) -> list[str]:
    """The lines of a column addition."""
    count = max(len(str(a)), len(str(b)))
    lines: list[str] = []
    carry = 0
    for place, (x, y) in enumerate(zip(digits(a, count), digits(b, count), strict=True)):
        total = x + y + carry
        line = f"{COLUMNS[place]}: {x} + {y}{' + 1' if carry else ''} = {total}"
        carry = total // 10
        if carry and place + 1 < count:
            line += f", {wording.carry.format(total % 10, carry)}"
        lines.append(f"{line}.")
    return lines


def difference_columns(a: int, b: int, wording: Wording) -> list[str]:
    """The lines of a column subtraction of the smaller b from a."""
    count = len(str(a))
    lines: list[str] = []
    borrowed = 0
    for place, (x, y) in enumerate(zip(digits(a, count), digits(b, count), strict=True)):
        taken = f" - 1 - {y}" if borrowed else f" - {y}"
        rest = x - borrowed - y
        if rest < 0:
            lines.append(f"{COLUMNS[place]}: {x}{taken}, {wording.borrow}: {x + 10}{taken} = {rest + 10}.")
        else:
            lines.append(f"{COLUMNS[place]}: {x}{taken} = {rest}.")
        borrowed = int(rest < 0)
    return lines


def product_columns(a: int, b: int, wording: Wording) -> list[str]:
    """The lines of a column multiplication of a by a single digit."""
    lines: list[str] = []
    count = len(str(a))
    carry = 0
    for place, x in enumerate(digits(a, count)):
        line = f"{COLUMNS[place]}: {x} x {b} = {x * b}"
        total = x * b + carry
        if carry:
            line += f", plus {carry} is {total}"
        carry = total // 10
        if carry and place + 1 < count:
            line += f", {wording.carry.format(total % 10, carry)}"
        lines.append(f"{line}.")
    return lines


def hops(start: int, change: int) -> tuple[str, int]:
    """A change by less than 1000 told in hops of hundreds, tens and ones, and where it leads.

    Hops touch one digit (and its carry) at a time, as one does in the head.
    """
    sign = "+" if change >= 0 else "-"
    steps: list[str] = []
    here = start
    for unit in (100, 10, 1):
        hop = abs(change) // unit % 10 * unit
        if hop:
            there = here + hop if change >= 0 else here - hop
            steps.append(f"{here} {sign} {hop} = {there}")
            here = there
    return ", ".join(steps), here


def close(rng: Random, equation: str, result: int) -> str:
    """The last line of a worked answer; its last number is the result."""
    return rng.choice((f"So {equation} = {result}.", f"So the answer is {result}.", f"The result is {result}."))


def _columns(
    template: Template, symbol: str, a: int, b: int, result: int, tell: Callable[[int, int, Wording], list[str]]
) -> Exercise:
    def answer(rng: Random) -> str:
        opener = rng.choice(
            (
                f"Let's work out {a} {symbol} {b} column by column.",
                f"Sure, here is {a} {symbol} {b} in columns.",
                "Start from the right.",
                f"We go from right to left through {a} {symbol} {b}.",
            )
        )
        return "\n".join([opener, *tell(a, b, Wording.draw(rng)), close(rng, f"{a} {symbol} {b}", result)])

    return Exercise(template.fill({"a": a, "b": b}), answer)


def _chain(rng: Random) -> Exercise:
    template, second, third = rng.choice(CHAIN_TEMPLATES)
    a, b, c = rng.randint(30, 99), rng.randint(2, 29), rng.randint(2, 30)
    if second < 0 and a < b:
        a, b = b, a

    def answer(rng: Random) -> str:
        first_steps, middle = hops(a, second * b)
        last_steps, result = hops(middle, third * c)
        first, then = rng.choice((("First", "Then"), ("Step 1", "Step 2"), ("First", "Next")))
        equation = f"{a} {'+' if second > 0 else '-'} {b} {'+' if third > 0 else '-'} {c}"
        return f"{first}: {first_steps}.\n{then}: {last_steps}.\n{close(rng, equation, result)}"

    return Exercise(template.fill({"a": a, "b": b, "c": c}), answer)


def _operands(rng: Random) -> tuple[int, int]:
    sizes = rng.choices(((2, 2), (3, 2), (2, 3), (3, 3)), weights=(3, 2, 1, 4))[0]
    a, b = (rng.randint(10 ** (size - 1), 10**size - 1) for size in sizes)
    return a, b


def draw(rng: Random) -> Exercise:
    """A calculation with numbers of two or three digits."""
    operation = rng.choices(("add", "subtract", "multiply", "chain"), weights=(5, 5, 4, 3))[0]
    if operation == "add":
        a, b = _operands(rng)
        return _columns(rng.choice(ADD), "+", a, b, a + b, sum_columns)
    if operation == "subtract":
        a, b = sorted(_operands(rng), reverse=True)
        return _columns(rng.choice(SUBTRACT), "-", a, b, a - b, difference_columns)
    if operation == "multiply":
        a, b = rng.choice((rng.randint(11, 99), rng.randint(100, 999))), rng.randint(2, 9)
        return _columns(rng.choice(MULTIPLY), "x", a, b, a * b, product_columns)
    return _chain(rng)


def result(prompt: str) -> int | None:
    """What the calculation in a prompt comes to."""
    for group, compute in ((ADD, int.__add__), (SUBTRACT, int.__sub__), (MULTIPLY, int.__mul__)):
        for template in group:
            if (found := template.read(prompt)) is not None:
                return int(compute(int(found["a"]), int(found["b"])))
    for template, second, third in CHAIN_TEMPLATES:
        if (found := template.read(prompt)) is not None:
            return int(found["a"]) + second * int(found["b"]) + third * int(found["c"])
    return None


ARITHMETIC: Final = Kind("arithmetic", 0.27, draw, result)
