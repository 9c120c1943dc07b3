"""Facts put in order: short Markdown tables and JSON records.

This file knows how facts are strewn into a prompt and how the same facts look as a table or a record. The answers
copy from the prompt, which is where a draft model with a view of the target's features does well.
"""

import json
from random import Random
from typing import Final

from deepspec_targets.dialogues.exercise import Exercise, Kind
from deepspec_targets.dialogues.words import CITIES, COLOURS, FOODS, HOBBIES, JOBS, NAMES, THINGS, listed

SUBJECTS: Final[tuple[tuple[str, str, tuple[str, ...], str, tuple[int, int]], ...]] = (
    ("Food", "Price", FOODS, "foods and prices", (1, 20)),
    ("Name", "Age", NAMES, "people and ages", (6, 80)),
    ("Item", "Count", THINGS, "items and counts", (2, 60)),
    ("City", "Days", CITIES, "cities and days", (1, 14)),
    ("Player", "Points", NAMES, "players and points", (1, 99)),
)


def _rows(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_table(rng: Random) -> Exercise:
    """A table of two or three columns from facts in a sentence."""
    left, right, pool, what, (low, high) = rng.choice(SUBJECTS)
    count = rng.randint(2, 4)
    keys = rng.sample(pool, count)
    numbers = [rng.randint(low, high) for _ in keys]
    third = rng.choice((("Colour", COLOURS), ("City", CITIES))) if count < 4 and rng.random() < 0.35 else None
    extra = rng.sample(third[1], count) if third and left != third[0] else []
    header: tuple[str, ...] = (left, right, third[0]) if third and extra else (left, right)
    rows: list[tuple[str, ...]] = [(key, str(number)) for key, number in zip(keys, numbers, strict=True)]
    if extra:
        rows = [(*row, word) for row, word in zip(rows, extra, strict=True)]
    facts = listed([" ".join(row) for row in rows])
    prompt = rng.choice(
        (
            f"Make a table of these {what}: {facts}.",
            f"Please put this in a Markdown table: {facts}. The columns are {listed(list(header))}.",
            f"Write a small table with {listed(list(header))} for {facts}.",
        )
    )
    if extra and header[2] not in prompt:
        prompt += f" The last column is {header[2]}."

    def answer(rng: Random) -> str:
        opener = rng.choice(("Here is the table:", "Sure, here it is:", f"Here are the {what}:", "Of course:"))
        closer = rng.choice(("", "", f"\n\nThe table has {count} rows.", "\n\nTell me if a row is missing."))
        return f"{opener}\n\n{_rows(header, rows)}{closer}"

    return Exercise(prompt, answer)


def _person(rng: Random) -> tuple[str, dict[str, object]]:
    name, age, city = rng.choice(NAMES), rng.randint(18, 80), rng.choice(CITIES)
    job, hobbies = rng.choice(JOBS), rng.sample(HOBBIES, rng.randint(1, 2))
    facts: dict[str, object] = {"name": name, "age": age}
    text = f"{name} is {age} years old"
    if rng.random() < 0.7:
        facts["city"] = city
        text += f", lives in {city}"
    if rng.random() < 0.6:
        facts["job"] = job
        text += f", works as {job}"
    facts["hobbies"] = hobbies
    return f"{text} and likes {listed(hobbies)}.", facts


def _order(rng: Random) -> tuple[str, dict[str, object]]:
    name, item, count, price = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 40), rng.randint(1, 30)
    paid = rng.random() < 0.5
    facts: dict[str, object] = {"customer": name, "item": item, "count": count, "price": price, "paid": paid}
    return f"{name} orders {count} {item} for {price} euros and has {'' if paid else 'not '}paid.", facts


def _thing(rng: Random) -> tuple[str, dict[str, object]]:
    item, colour, city, count = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(CITIES), rng.randint(2, 99)
    facts: dict[str, object] = {"item": item, "colour": colour, "count": count, "city": city}
    return f"There are {count} {colour} {item} in {city}.", facts


def draw_record(rng: Random) -> Exercise:
    """A JSON record from facts in a sentence."""
    text, facts = rng.choices((_person, _order, _thing), weights=(3, 2, 1))[0](rng)
    prompt = rng.choice(
        (
            f"Write this as JSON: {text}",
            f"Make a JSON record. {text}",
            f"{text} Can you give me that as JSON?",
            f"Turn this into a JSON object: {text}",
        )
    )

    def answer(rng: Random) -> str:
        opener = rng.choice(("Here is the record:", "Sure:", "Here you go:", "As JSON:"))
        return f"{opener}\n\n```json\n{json.dumps(facts, indent=rng.choice((2, 2, None)))}\n```"

    return Exercise(prompt, answer)


TABLE: Final = Kind("table", 0.09, draw_table)
RECORD: Final = Kind("record", 0.08, draw_record)
