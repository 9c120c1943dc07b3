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
from deepspec_core.evaluation.turns import prompt_of


@frozen(kw_only=True)
class Difference:
    """A difference in tokens per round, with a 95% bootstrap interval over prompts."""

    value: float
    interval: tuple[float, float]


def paired_difference(first: Sequence[Completion], second: Sequence[Completion], *, seed: int) -> Difference | None:
    """The accepted length of the first minus that of the second, each pooled over its rounds.

    Returns None if the prompts of the two are not the same, or if one of them has no rounds.
    """
    others = {done.id: done for done in second}
    pairs = [(done, others.get(done.id)) for done in first]
    if len(first) != len(second) or any(other is None or one.prompt_ids != other.prompt_ids for one, other in pairs):
        return None
    # All answers to a prompt are drawn together, because they are not independent.
    of_prompts: dict[str, np.ndarray] = {}
    for one in first:
        counts_4 = np.array([*_counts(one), *_counts(others[one.id])], dtype=np.int64)
        of_prompts[prompt_of(one.id)] = of_prompts.get(prompt_of(one.id), 0) + counts_4
    counts_N4 = np.array(list(of_prompts.values()), dtype=np.int64).reshape(-1, 4)
    if not counts_N4[:, (1, 3)].sum(0).all():
        return None
    draws = np.random.default_rng(seed).integers(len(counts_N4), size=(BOOTSTRAP_DRAWS, len(counts_N4)))
    drawn_D4 = counts_N4[draws].sum(1)
    drawn_D = _difference(drawn_D4[drawn_D4[:, (1, 3)].all(1)])
    low, high = np.quantile(drawn_D, [0.025, 0.975])
    return Difference(value=float(_difference(counts_N4.sum(0)[None])[0]), interval=(float(low), float(high)))


def _counts(done: Completion) -> tuple[int, int]:
    """Committed tokens and rounds."""
    return sum(each.acceptance_length for each in done.rounds), len(done.rounds)


def _difference(counts_D4: np.ndarray) -> np.ndarray:
    tokens, rounds, other_tokens, other_rounds = counts_D4.T
    found: np.ndarray = tokens / rounds - other_tokens / other_rounds
    return found
