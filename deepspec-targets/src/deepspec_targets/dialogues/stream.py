"""Streams of prompts and dialogues, dealt from all kinds of exercise, in two splits that share no prompt.

This file knows the split rule, the identifiers, that nothing is dealt twice, and how two-turn dialogues are put
together. It knows no subject. A prompt's split is a property of its text alone, so it holds for every seed and every
later version of the generator.
"""

import hashlib
from collections.abc import Iterator
from random import Random
from typing import Any, Final

from deepspec_targets.dialogues.arithmetic import ARITHMETIC
from deepspec_targets.dialogues.chat import CHAT
from deepspec_targets.dialogues.conversions import CONVERSION
from deepspec_targets.dialogues.exercise import Exercise, Kind, final_number
from deepspec_targets.dialogues.functions import CODE
from deepspec_targets.dialogues.records import RECORD, TABLE
from deepspec_targets.dialogues.stories import STORY

KINDS: Final[tuple[Kind, ...]] = (ARITHMETIC, STORY, CONVERSION, TABLE, RECORD, CODE, CHAT)
SPLITS: Final = ("train", "held_out")

_BUCKETS: Final = 10
_TWO_TURNS: Final = 0.06
# A kind that finds no new prompt in this many draws is spent and leaves the stream.
_PATIENCE: Final = 1000

_FOLLOW_UPS: Final = (
    ("Thank you!", ("You are welcome!", "Happy to help!", "Any time!", "My pleasure.")),
    ("Great, thanks.", ("You are welcome!", "Glad it helped.", "Any time!", "Have a nice day!")),
    ("Thanks, bye!", ("Bye! Have a nice day!", "Take care!", "See you soon!")),
)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def split_of(prompt: str) -> str:
    """The split a prompt belongs to: one text in ten is held out, by a hash of the text."""
    return "held_out" if int(_digest(prompt)[-8:], 16) % _BUCKETS == 0 else "train"


def answer_of(prompt: str) -> int | None:
    """The number an arithmetic exercise, a story or a conversion asks for; None for all other prompts."""
    for kind in KINDS:
        if kind.result is not None and (value := kind.result(prompt)) is not None:
            return value
    return None


def check(prompt: str, answer: str) -> bool | None:
    """Whether an answer ends in the right result, or None where there is no single right answer."""
    expected = answer_of(prompt)
    return None if expected is None else final_number(answer) == expected


def _require_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(map(repr, SPLITS))}")


def _exercises(split: str, seed: int) -> Iterator[tuple[str, str, Exercise]]:
    """Exercises of one split with their identifier and kind, none twice, until every kind is spent."""
    rng = Random(f"deepspec-dialogues/{split}/{seed}")
    kinds = list(KINDS)
    seen: set[str] = set()
    while kinds:
        kind = rng.choices(kinds, weights=[kind.weight for kind in kinds])[0]
        for _ in range(_PATIENCE):
            exercise = kind.draw(rng)
            name = f"{kind.name}-{_digest(exercise.prompt)[:16]}"
            if name not in seen and split_of(exercise.prompt) == split:
                seen.add(name)
                yield name, kind.name, exercise
                break
        else:
            kinds.remove(kind)


def prompts(split: str, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Single-turn prompts: `{"id", "kind", "messages": [{"role": "user", "content"}]}`, none twice.

    The stream is lazy and finite. "train" holds more than 200,000 prompts and "held_out" more than 20,000. The mix of
    kinds is even for the first 80,000 and 8,000; then small talk, the smallest kind, runs out. The same split and seed
    always give the same stream, and the identifier depends on the text alone.

    Raises ValueError for an unknown split, when called and not only when iterated.
    """
    _require_split(split)
    return (
        {"id": name, "kind": kind, "messages": [{"role": "user", "content": exercise.prompt}]}
        for name, kind, exercise in _exercises(split, seed)
    )


def dialogues(split: str, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The same prompts in the same order, answered; a few go on for a second turn.

    The wording of an answer depends on the seed and the prompt. The second question of a two-turn dialogue is a plain
    thank-you or another prompt of the same split. Raises ValueError for an unknown split.
    """
    _require_split(split)
    return _dialogues(split, seed)


def _dialogues(split: str, seed: int) -> Iterator[dict[str, Any]]:
    for name, kind, exercise in _exercises(split, seed):
        rng = Random(f"deepspec-answer/{seed}/{exercise.prompt}")
        turns = [(exercise.prompt, exercise.answer(rng))]
        if rng.random() < _TWO_TURNS:
            turns.append(_second_turn(split, rng))
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        yield {"id": name, "kind": kind, "messages": messages}


def _second_turn(split: str, rng: Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        thanks, replies = rng.choice(_FOLLOW_UPS)
        return thanks, rng.choice(replies)
    while True:
        kind = rng.choices(KINDS, weights=[kind.weight for kind in KINDS])[0]
        exercise = kind.draw(rng)
        if split_of(exercise.prompt) == split:
            return exercise.prompt, exercise.answer(rng)
