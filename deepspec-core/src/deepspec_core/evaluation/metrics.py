"""Figures of speculative decoding from recorded rounds, defined once, pooled over rounds and never averaged per sample.

A round is one proposal and its verification. Untrimmed rounds count: the last round of a sample may commit more than
the limit admits. Knows counts only; not who proposed, nor how long anything took.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import asdict, frozen

from deepspec_core.decoding.engine import Completion

BOOTSTRAP_DRAWS = 1000
LOOP_TAIL = 48


@frozen(kw_only=True)
class PooledMetrics:
    """One task at one temperature.

    acceptance_length: tokens committed per round (tau), with a 95% bootstrap interval over samples.
    verify_rate: tokens committed per token the target scored. marginal[k]: of the rounds that proposed token k, the
    share in which it stood; conditional[k]: the same among rounds in which all tokens before k stood. A position no
    round reached is None. limit_share and loop_share: samples that hit the token limit, and those whose tail repeats
    itself; both inflate accepted length.
    """

    samples: int
    rounds: int
    output_tokens: int
    acceptance_length: float
    acceptance_length_interval: tuple[float, float]
    draft_tokens_per_proposal: float
    verify_rate: float
    marginal: tuple[float | None, ...]
    conditional: tuple[float | None, ...]
    limit_share: float
    loop_share: float

    def as_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return asdict(self)


def pool(completions: Sequence[Completion], *, seed: int = 0) -> PooledMetrics:
    """Pooled figures of finished sequences; a sample whose first token was a stop token has no rounds but counts."""
    rounds = np.array(
        [
            (sample, r.proposal_length, r.accepted_draft_length, r.acceptance_length)
            for sample, completion in enumerate(completions)
            for r in completion.rounds
        ],
        dtype=np.int64,
    ).reshape(-1, 4)
    sample, proposed, accepted, committed = rounds.T
    positions = range(int(proposed.max(initial=0)))
    return PooledMetrics(
        samples=len(completions),
        rounds=len(rounds),
        output_tokens=sum(len(completion.output_ids) for completion in completions),
        acceptance_length=_ratio(committed.sum(), len(rounds)) or 0.0,
        acceptance_length_interval=_interval(sample, committed, len(completions), seed),
        draft_tokens_per_proposal=_ratio(proposed.sum(), len(rounds)) or 0.0,
        verify_rate=_ratio(committed.sum(), proposed.sum() + len(rounds)) or 0.0,
        marginal=tuple(_ratio((accepted > k).sum(), (proposed > k).sum()) for k in positions),
        conditional=tuple(_ratio((accepted > k).sum(), ((accepted >= k) & (proposed > k)).sum()) for k in positions),
        limit_share=_ratio(sum(c.finish_reason == "length" for c in completions), len(completions)) or 0.0,
        loop_share=_ratio(sum(loops(c.output_ids) for c in completions), len(completions)) or 0.0,
    )


def loops(output_ids: Sequence[int]) -> bool:
    """Whether the last LOOP_TAIL tokens repeat with a period of at most a quarter of them."""
    tail = list(output_ids[-LOOP_TAIL:])
    if len(tail) < LOOP_TAIL:
        return False
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_TAIL // 4 + 1))


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def _interval(sample: np.ndarray, committed: np.ndarray, num_samples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the pooled ratio; samples are the units, for rounds of one sample are not independent."""
    if len(sample) == 0:
        return (0.0, 0.0)
    tokens = np.bincount(sample, weights=committed, minlength=num_samples)
    rounds = np.bincount(sample, minlength=num_samples)
    draws = np.random.default_rng(seed).integers(num_samples, size=(BOOTSTRAP_DRAWS, num_samples))
    drawn_rounds = rounds[draws].sum(1)
    drawn = tokens[draws].sum(1)[drawn_rounds > 0] / drawn_rounds[drawn_rounds > 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return (float(low), float(high))
