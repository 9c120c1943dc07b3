"""The difference of two accepted lengths on the same prompts, with an interval.

Prompts differ more than drafts do. So each draw of the bootstrap takes the same prompts for both drafts. This file
knows counts. It does not know drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from deepspec_core.decoding.engine import Completion
from deepspec_core.evaluation.metrics import BOOTSTRAP_DRAWS
from deepspec_core.evaluation.turns import first_turn_of, prompt_of


@frozen(kw_only=True)
class Difference:
    """A difference in tokens per round, with a 95% bootstrap interval over prompts.

    prompts: How many prompts it is of. left_out: How many prompts only one of the two has answers to.
    """

    value: float
    interval: tuple[float, float]
    prompts: int
    left_out: int


@frozen
class NoDifference:
    """There is no difference, for this reason."""

    reason: str


def paired_difference(
    first: Sequence[Completion], second: Sequence[Completion], *, seed: int
) -> Difference | NoDifference:
    """The accepted length of the first minus that of the second, each pooled over its rounds.

    It is of the prompts that both have answers to, with all their samples and turns. Later turns follow each draft's
    own answers, so only the first turns must be equal.
    """
    asked = {done.id: done.prompt_ids for done in second if first_turn_of(done.id) == done.id}
    if any(asked.get(done.id, done.prompt_ids) != done.prompt_ids for done in first):
        return NoDifference("prompts with the same names have other tokens")
    # All answers to a prompt are drawn together, because they are not independent.
    mine, other = _by_prompt(first), _by_prompt(second)
    both = [name for name in mine if name in other]
    if not both:
        return NoDifference("there is no prompt that both have answers to")
    counts_N4 = np.array([[*mine[name], *other[name]] for name in both], dtype=np.int64)
    if not counts_N4[:, (1, 3)].sum(0).all():
        return NoDifference("one of them has no rounds, because its answers end at their first token")
    draws = np.random.default_rng(seed).integers(len(counts_N4), size=(BOOTSTRAP_DRAWS, len(counts_N4)))
    drawn_D4 = counts_N4[draws].sum(1)
    drawn_D = _difference(drawn_D4[drawn_D4[:, (1, 3)].all(1)])
    low, high = np.quantile(drawn_D, [0.025, 0.975])
    return Difference(
        value=float(_difference(counts_N4.sum(0)[None])[0]),
        interval=(float(low), float(high)),
        prompts=len(both),
        left_out=len(mine.keys() | other.keys()) - len(both),
    )


def _by_prompt(completions: Sequence[Completion]) -> dict[str, tuple[int, int]]:
    """Committed tokens and rounds of each prompt."""
    found: dict[str, tuple[int, int]] = {}
    for done in completions:
        tokens, rounds = found.get(prompt_of(done.id), (0, 0))
        committed = sum(each.acceptance_length for each in done.rounds)
        found[prompt_of(done.id)] = (tokens + committed, rounds + len(done.rounds))
    return found


def _difference(counts_D4: np.ndarray) -> np.ndarray:
    tokens, rounds, other_tokens, other_rounds = counts_D4.T
    found: np.ndarray = tokens / rounds - other_tokens / other_rounds
    return found
