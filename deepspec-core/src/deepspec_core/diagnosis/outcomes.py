"""The outcomes of proposals, block by block, and the figures by which the stages of a diagnosis are compared.

A block is one proposal: of a training pass, of the engine, or of a server. This file knows which tokens of a block
counted and matched. It does not know where blocks come from.

Legend: M blocks, S positions of a block, G groups (samples or prompts), D draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from deepspec_core.decoding.engine import Completion

DRAWS = 1000
# The middle 99% of the draws, not 95%, because several stages are compared and each comparison may be a false alarm.
_QUANTILES = (0.005, 0.995)

Counts = NDArray[np.float64]


@frozen(kw_only=True, eq=False)
class Outcomes:
    """Sums over the blocks of each group, [G, S]. The blocks of one group are not independent of each other.

    counted, matched: The number of blocks that have a token at a position, and how many of these tokens matched.
    reached, survived: The same two counts over the blocks whose tokens before the position all matched.
    unfit: The number of the draft's outputs that are not finite. Their tokens count as not matched.
    """

    matched: Counts
    counted: Counts
    survived: Counts
    reached: Counts
    unfit: int = 0

    @property
    def groups(self) -> int:
        """The number of samples or prompts."""
        return len(self.counted)

    @property
    def blocks(self) -> int:
        """The number of proposals that have a first token."""
        return int(self.counted[:, :1].sum())

    def shares(self) -> list[float | None]:
        """By position, the share of tokens that match, whether or not those before match. None: no token."""
        return _ratios(self.matched.sum(0), self.counted.sum(0))

    def conditional(self) -> list[float | None]:
        """By position, the share of tokens that match, given that all tokens before them match."""
        return _ratios(self.survived.sum(0), self.reached.sum(0))

    def accepted(self) -> float:
        """Accepted draft tokens per round, from the conditional shares: sum_k prod_{j<=k} share_j."""
        return float(_accepted(self.survived.sum(0), self.reached.sum(0)))

    def mean_share(self) -> float:
        """The mean of `shares` over the positions that have a token."""
        return float(_mean(self.matched.sum(0), self.counted.sum(0)))


def of_blocks(group_M: Sequence[int], matched_MS: NDArray[np.bool_], counted_MS: NDArray[np.bool_]) -> Outcomes:
    """The outcomes of blocks, each with the number of its group. In a block, counted tokens precede all others."""
    groups = np.unique(np.asarray(group_M, dtype=np.int64), return_inverse=True)[1]
    size = int(groups.max(initial=-1)) + 1
    before_MS = np.cumprod(np.pad(matched_MS, ((0, 0), (1, 0)), constant_values=True)[:, :-1], axis=1).astype(bool)

    def summed(flags_MS: NDArray[np.bool_]) -> Counts:
        sums = np.zeros((size, flags_MS.shape[1]))
        np.add.at(sums, groups, flags_MS)
        return sums

    return Outcomes(
        matched=summed(matched_MS & counted_MS),
        counted=summed(counted_MS),
        survived=summed(matched_MS & counted_MS & before_MS),
        reached=summed(counted_MS & before_MS),
    )


def of_completions(completions: Sequence[Completion], *, last: bool = False) -> Outcomes:
    """The outcomes of the engine's rounds. The last round of each answer is left out, because the answer's end cuts it.

    With `last` it is included, as in the counts of a server.
    """
    rounds = [(group, r) for group, done in enumerate(completions) for r in (done.rounds if last else done.rounds[:-1])]
    positions = np.arange(max((r.proposal_length for _, r in rounds), default=0))
    proposed = np.array([r.proposal_length for _, r in rounds], dtype=np.int64)[:, None]
    accepted = np.array([r.accepted_draft_length for _, r in rounds], dtype=np.int64)[:, None]
    return of_blocks([group for group, _ in rounds], positions < accepted, positions < proposed)


@frozen(kw_only=True)
class Difference:
    """A later stage minus an earlier one, with a 99% bootstrap interval over samples or prompts."""

    earlier: float
    later: float
    interval: tuple[float, float]

    def drops(self, tolerance: float) -> bool:
        """Whether the later stage is significantly lower, and by more than this share of the earlier one."""
        return self.interval[1] < 0 and self.earlier - self.later > tolerance * self.earlier


def accepted_difference(earlier: Outcomes, later: Outcomes, *, paired: bool, seed: int = 0) -> Difference:
    """The difference in accepted draft tokens per round. `paired`: Both have the same groups, drawn together."""
    rng = np.random.default_rng(seed)
    draws = _draws(rng, earlier.groups)
    of_earlier = _accepted(draws @ earlier.survived, draws @ earlier.reached)
    draws = draws if paired and later.groups == earlier.groups else _draws(rng, later.groups)
    of_later = _accepted(draws @ later.survived, draws @ later.reached)
    return Difference(earlier=earlier.accepted(), later=later.accepted(), interval=_interval(of_later - of_earlier))


def share_difference(recorded: Sequence[float], samples: int, later: Outcomes, *, seed: int = 0) -> Difference:
    """The difference in the mean share of matching tokens. The earlier stage has shares only."""
    rng = np.random.default_rng(seed)
    size = min(len(recorded), later.counted.shape[1])
    draws = _draws(rng, later.groups)
    of_later = _mean((draws @ later.matched)[:, :size], (draws @ later.counted)[:, :size])
    # Each sample counts as one observation, because the tokens of a sample are not independent.
    of_earlier = np.mean([rng.binomial(samples, share, DRAWS) / samples for share in recorded[:size]], axis=0)
    mean = float(_mean(later.matched.sum(0)[:size], later.counted.sum(0)[:size]))
    return Difference(earlier=float(np.mean(recorded[:size])), later=mean, interval=_interval(of_later - of_earlier))


def accepted_interval(outcomes: Outcomes, *, seed: int = 0) -> tuple[float, float]:
    """The 99% interval of the accepted draft tokens per round."""
    draws = _draws(np.random.default_rng(seed), outcomes.groups)
    return _interval(_accepted(draws @ outcomes.survived, draws @ outcomes.reached))


def _draws(rng: np.random.Generator, groups: int) -> Counts:
    """The number of times that each group is drawn in each draw, [D, G]."""
    return rng.multinomial(groups, np.full(groups, 1 / max(1, groups)), size=DRAWS).astype(np.float64)


def _accepted(survived: Counts, reached: Counts) -> Counts:
    """Accepted draft tokens per round, [..., S] -> [...]. A position that no block reached adds 0."""
    ratio = np.divide(survived, reached, out=np.zeros_like(survived), where=reached > 0)
    found: Counts = np.cumprod(ratio, axis=-1).sum(-1)
    return found


def _mean(matched: Counts, counted: Counts) -> Counts:
    seen = counted > 0
    ratio = np.divide(matched, counted, out=np.zeros_like(matched), where=seen)
    found: Counts = ratio.sum(-1) / np.maximum(1, seen.sum(-1))
    return found


def _ratios(above: Counts, below: Counts) -> list[float | None]:
    return [float(a / b) if b else None for a, b in zip(above, below, strict=True)]


def _interval(values: Counts) -> tuple[float, float]:
    low, high = np.quantile(values, _QUANTILES)
    return float(low), float(high)
