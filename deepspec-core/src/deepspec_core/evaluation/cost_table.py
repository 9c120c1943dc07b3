"""A cost table: how many steps per second a target takes, by concurrent requests and tokens in the batch.

This file knows the table's file and how values between measured ones are interpolated. It does not measure.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

from attrs import asdict, frozen

from deepspec_core.decoding.profiling import Step
from deepspec_core.errors import ConfigError, StageError
from deepspec_core.evaluation.sealed_json import read_sealed, write_json, write_sealed

FORM: Final = "deepspec-cost-table"
VERSION: Final = 1
_FIX: Final = "Measure it with `deepspec profile TARGET`."
_POSITIVE: Final = ("seconds", "lower_quartile", "upper_quartile")
_COUNTS: Final = ("requests", "tokens", "repeats")


@frozen(kw_only=True)
class CostTable:
    """Measured steps of one target. Each batch size has a step with one token per request, and longer steps."""

    steps: tuple[Step, ...]
    about: Mapping[str, Any]

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The numbers of requests that were measured, ascending."""
        return tuple(sorted({step.requests for step in self.steps}))

    def seconds(self, requests: int, tokens: float) -> float:
        """The time of a step of this many requests with `tokens` tokens in all.

        The time is interpolated linearly between the nearest measured steps. Raises ConfigError if this number of
        requests was not measured, or if `tokens` lies outside its measured steps.
        """
        row = sorted((step.tokens, step.seconds) for step in self.steps if step.requests == requests)
        if not row:
            raise ConfigError(
                "the cost table has no step of so many requests",
                found=f"{requests}",
                expected=", ".join(map(str, self.batch_sizes)),
                fix="Choose one of these, or profile the target at this batch size.",
            )
        if not row[0][0] <= tokens <= row[-1][0]:
            raise ConfigError(
                "the cost table has no step of so many tokens",
                found=f"{tokens:g} tokens of {requests} requests",
                expected=f"{row[0][0]} to {row[-1][0]}",
                fix="Profile the target with as many draft tokens as the draft proposes (--draft-tokens).",
            )
        at = bisect_left(row, (tokens, 0.0))
        (above, slow) = row[at]
        if above == tokens:
            return slow
        below, fast = row[at - 1]
        return fast + (slow - fast) * (tokens - below) / (above - below)

    def steps_per_second(self, requests: int, tokens: int) -> float:
        """1 / seconds, also for numbers of requests between measured ones.

        Between them, the seconds are interpolated linearly between the nearest two measured numbers of requests, at the
        same number of tokens per request. Raises ConfigError, as `seconds` does, for fewer or more requests than were
        measured, and where the tokens exceed the measured steps of either neighbour.
        """
        sizes = self.batch_sizes
        at = bisect_left(sizes, requests)
        if requests in sizes or not 0 < at < len(sizes):
            return 1 / self.seconds(requests, tokens)
        few, many, each = sizes[at - 1], sizes[at], tokens / requests
        fast, slow = self.seconds(few, few * each), self.seconds(many, many * each)
        return 1 / (fast + (slow - fast) * (requests - few) / (many - few))


def write_cost_table(path: Path, steps: Sequence[Step], about: Mapping[str, Any]) -> Path:
    """Write the table, and beside it the form that SGLang reads, which is by tokens alone. Returns the second path.

    In the second file, steps per second never rise with the number of tokens: each number of tokens has the speed of
    the fastest step with at least as many tokens.

    `about` has the target ("model", "revision", "dtype"), the machine and the settings.
    """
    rows = [{**asdict(step), "steps_per_second": 1 / step.seconds} for step in steps]
    write_sealed(path, {**about, "steps": rows}, form=FORM, version=VERSION)
    by_tokens = sorted({step.tokens for step in steps})
    # Several batch sizes may have the same number of tokens.
    taken = [median(step.seconds for step in steps if step.tokens == tokens) for tokens in by_tokens]
    # SGLang looks up the next smaller number of tokens. If more tokens seemed faster, they would seem to pay whatever
    # is accepted. A step can be padded to the length of a longer one, so it never needs more time than the longer one.
    speeds = [1 / least for least in accumulate(reversed(taken), min)][::-1]
    served = served_place(path)
    write_json(
        served,
        {
            "sample_batch_tokens": by_tokens,
            "sample_steps_per_sec": speeds,
            "max_batch_tokens": by_tokens[-1],
        },
    )
    return served


def faster_with_more(steps: Sequence[Step]) -> str | None:
    """A sentence about steps that took less time than a step of fewer tokens (mostly noise). None if there are none."""
    ordered = sorted(steps, key=lambda step: (step.requests, step.tokens))
    pairs = [(a, b) for a, b in pairwise(ordered) if a.requests == b.requests and a.seconds > b.seconds]
    if not pairs:
        return None
    few, more = max(pairs, key=lambda pair: pair[0].seconds / pair[1].seconds)
    return (
        f"In this cost table, {len(pairs)} of the steps took less time than a step of fewer tokens, at most by "
        f"{1 - more.seconds / few.seconds:.0%} ({more.tokens} tokens and {few.tokens} tokens at batch size "
        f"{few.requests}). There, more tokens seem to pay whatever is accepted. Measure on an idle machine, with more "
        "--repeats."
    )


def served_place(path: Path) -> Path:
    """The path of the form that SGLang reads, beside the table at `path`."""
    return path.with_name(f"{path.stem}.sglang.json")


def read_cost_table(path: Path, *, target: Mapping[str, Any]) -> CostTable:
    """Read the table of this target. `target` has "model", "revision" and "dtype" as in metrics.json.

    Raises StageError if the file is missing, damaged or edited, or if its target or dtype is another one.
    """
    found = read_sealed(path, form=FORM, version=VERSION, what="the cost table", kind=StageError, fix=_FIX)
    own = found.get("target")
    own = own if isinstance(own, dict) else {}
    for name, what in (("revision", "another target"), ("dtype", "the target in another number format")):
        if own.get(name) != target.get(name):
            raise StageError(
                f"the cost table is of {what}",
                where=path,
                found=f"{own.get('model')}, {name} {str(own.get(name))[:16]}",
                expected=f"{target.get('model')}, {name} {str(target.get(name))[:16]}",
                fix=_FIX,
            )
    rows = found.get("steps")
    steps = [_step(row, path) for row in rows] if isinstance(rows, list) else []
    pairs = {(step.requests, step.tokens) for step in steps}
    sizes = {step.requests for step in steps}
    if not steps or len(pairs) < len(steps) or any((size, size) not in pairs for size in sizes):
        raise StageError(
            "the cost table is incomplete",
            where=f"{path}: steps",
            found=f"{len(steps)} steps, {len(pairs)} of them different",
            expected="for every batch size a step of one token a request, each step once",
            fix=_FIX,
        )
    about = {key: value for key, value in found.items() if key != "steps"}
    return CostTable(steps=tuple(steps), about=about)


def _step(row: Any, path: Path) -> Step:
    fields = row if isinstance(row, dict) else {}
    times = [fields.get(name) for name in _POSITIVE]
    counts = [fields.get(name) for name in _COUNTS]
    whole = all(type(count) is int and count > 0 for count in counts)
    real = all(type(one) is float and math.isfinite(one) and one > 0 for one in times)
    if not (whole and real) or fields["tokens"] < fields["requests"]:
        raise StageError(
            "a step of the cost table makes no sense",
            where=f"{path}: steps",
            found=repr(row)[:120],
            expected="seconds above 0, and at least one token a request",
            fix=_FIX,
        )
    return Step(**{name: fields[name] for name in (*_COUNTS, *_POSITIVE)})
