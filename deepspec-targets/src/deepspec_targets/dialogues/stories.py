"""Short stories with numbers: someone has things, gets some, gives some away, packs boxes.

This file knows a dozen plots and how each is solved in steps. The steps are told with the same hops as other mental
arithmetic; nothing here knows columns or units.
"""

from dataclasses import dataclass
from random import Random
from typing import Final

from deepspec_targets.dialogues.arithmetic import hops
from deepspec_targets.dialogues.exercise import Exercise, Kind, Template
from deepspec_targets.dialogues.words import DAYS, NAMES, THINGS, two


@dataclass(frozen=True)
class Plot:
    """A story and its changes: each step says which number is added or taken away, and how to say so."""

    template: Template
    steps: tuple[tuple[str, int, str], ...]
    boxes: bool = False

    def start(self, numbers: dict[str, int]) -> int:
        """The number the story begins with; boxes are counted first."""
        return numbers["n"] * numbers["m"] if self.boxes else numbers["a"]

    def result(self, numbers: dict[str, int]) -> int:
        """The number the story ends with."""
        return self.start(numbers) + sum(sign * numbers[name] for name, sign, _ in self.steps)


PLOTS: Final = (
    Plot(
        Template(
            "{who} has {a:d} {things}. {who} buys {b:d} more and gives {c:d} to {other}. "
            "How many {things} does {who} have now?"
        ),
        (("b", 1, "Buy"), ("c", -1, "Give away")),
    ),
    Plot(
        Template(
            "{who} had {a:d} {things} and lost {b:d} of them. Then {other} gave {who} {c:d} {things}. "
            "How many {things} does {who} have?"
        ),
        (("b", -1, "Lose"), ("c", 1, "Get")),
    ),
    Plot(
        Template("{who} has {a:d} {things} and {other} has {b:d} {things}. How many {things} do they have together?"),
        (("b", 1, "Together"),),
    ),
    Plot(
        Template("There were {a:d} {things} in the shop. On {day} {b:d} were sold. How many {things} are left?"),
        (("b", -1, "Sold"),),
    ),
    Plot(
        Template(
            "{who} packs {n:d} boxes with {m:d} {things} in each box. {b:d} {things} do not fit. "
            "How many {things} are there in all?"
        ),
        (("b", 1, "Not packed"),),
        boxes=True,
    ),
    Plot(
        Template(
            "{who} buys {n:d} bags of {m:d} {things} and gives {c:d} {things} to {other}. How many {things} are left?"
        ),
        (("c", -1, "Give away"),),
        boxes=True,
    ),
    Plot(
        Template(
            "A train leaves with {a:d} people. At the first stop {b:d} get on, at the second stop {c:d} get off. "
            "How many people are on the train?"
        ),
        (("b", 1, "First stop"), ("c", -1, "Second stop")),
    ),
    Plot(
        Template(
            "On {day} {who} read {a:d} pages, and the next day {b:d} pages. How many pages did {who} read in two days?"
        ),
        (("b", 1, "Next day"),),
    ),
)


def draw(rng: Random) -> Exercise:
    """A story about people and the things they have."""
    plot = rng.choice(PLOTS)
    who, other = two(rng, NAMES)
    words = {"who": who, "other": other, "things": rng.choice(THINGS), "day": rng.choice(DAYS)}
    numbers = {
        "a": rng.randint(30, 99),
        "b": rng.randint(3, 29),
        "c": rng.randint(2, 29),
        "n": rng.randint(3, 9),
        "m": rng.randint(3, 9),
    }
    if plot.boxes:
        numbers["c"] = rng.randint(2, min(29, numbers["n"] * numbers["m"] - 2))
    unit = "people" if "people" in plot.template.text else "pages" if "pages" in plot.template.text else words["things"]

    def answer(rng: Random) -> str:
        here = plot.start(numbers)
        if plot.boxes:
            lines = [f"Count the {unit} first: {numbers['n']} x {numbers['m']} = {here}."]
        else:
            lines = [
                rng.choice((f"Start with {here} {unit}.", f"At first there are {here} {unit}.", f"Start: {here}."))
            ]
        for name, sign, label in plot.steps:
            told, here = hops(here, sign * numbers[name])
            lines.append(f"{label} {numbers[name]}: {told}.")
        lines.append(rng.choice((f"The answer is {here} {unit}.", f"So there are {here} {unit}.", f"So it is {here}.")))
        return "\n".join(lines)

    return Exercise(plot.template.fill({**words, **numbers}), answer)


def result(prompt: str) -> int | None:
    """The number a story asks for."""
    for plot in PLOTS:
        if (found := plot.template.read(prompt)) is not None:
            return plot.result({name: int(text) for name, text in found.items() if text.isdigit()})
    return None


STORY: Final = Kind("story", 0.14, draw, result)
