"""Figures of speculative decoding from recorded rounds. They are pooled over all rounds, not averaged over samples.

A round is one proposal and its verification. Rounds count before trimming: the last round of a sample may commit more
tokens than its limit admits. This file knows counts. It does not know proposers or times.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from attrs import asdict, frozen

from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.evaluation.turns import prompt_of

BOOTSTRAP_DRAWS = 1000
# The end of the first bucket, in tokens of context. Each further bucket ends at twice the length.
FIRST_BUCKET = 256
LOOP_TAIL = 48


@frozen(kw_only=True)
class ContextBucket:
    """The rounds that began with at least `start` and fewer than `end` tokens of context, the prompt included."""

    start: int
    end: int
    rounds: int
    acceptance_length: float


@frozen(kw_only=True)
class PooledMetrics:
    """The figures of one task at one temperature.

    prompts: Prompts with an answer. samples: Answers; a prompt with later turns, or with several samples, has several.
    acceptance_length: Tokens committed per round (tau), with a 95% bootstrap interval over prompts: all answers to a
        prompt are drawn together. These and the next two are None if there was no round.
    draft_tokens_per_proposal: Tokens proposed per round. In a tree, all of its tokens count.
    verify_rate: Tokens committed per token that the target scored.
    marginal: For each position k, the share of the rounds that proposed token k in which it was accepted.
    conditional: The same share, among the rounds in which all tokens before k were accepted.
    limit_share: The share of samples that reached the token limit.
    loop_share: The share of samples whose end repeats itself.
    by_context: The accepted length by the length of the context. Buckets without rounds are left out.

    In a tree a position is a depth, and a round proposes a token there if its longest path reaches it. A position that
    no round reached is None. Samples that loop or reach the limit inflate the accepted length.
    """

    prompts: int
    samples: int
    rounds: int
    output_tokens: int
    acceptance_length: float | None
    acceptance_length_interval: tuple[float, float] | None
    draft_tokens_per_proposal: float | None
    verify_rate: float | None
    marginal: tuple[float | None, ...]
    conditional: tuple[float | None, ...]
    limit_share: float
    loop_share: float
    by_context: tuple[ContextBucket, ...]

    def as_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return asdict(self)


def pool(completions: Sequence[Completion], *, seed: int = 0) -> PooledMetrics:
    """Pooled figures of finished sequences. A sample whose first token is a stop token has no rounds, but it counts."""
    rounds = np.array(
        [
            (sample, r.proposal_length, r.accepted_draft_length, r.acceptance_length, context, _scored(r))
            for sample, completion in enumerate(completions)
            for r, context in zip(completion.rounds, _contexts(completion), strict=True)
        ],
        dtype=np.int64,
    ).reshape(-1, 6)
    sample, proposed, accepted, committed, context, scored = rounds.T
    positions = range(int(proposed.max(initial=0)))
    numbers: dict[str, int] = {}
    prompts = np.array([numbers.setdefault(prompt_of(c.id), len(numbers)) for c in completions], dtype=np.int64)
    return PooledMetrics(
        prompts=len(numbers),
        samples=len(completions),
        rounds=len(rounds),
        output_tokens=sum(len(completion.output_ids) for completion in completions),
        acceptance_length=_ratio(committed.sum(), len(rounds)),
        acceptance_length_interval=_interval(prompts[sample], committed, len(set(prompts)), seed),
        draft_tokens_per_proposal=_ratio(scored.sum(), len(rounds)),
        verify_rate=_ratio(committed.sum(), scored.sum() + len(rounds)),
        marginal=tuple(_ratio((accepted > k).sum(), (proposed > k).sum()) for k in positions),
        conditional=tuple(_ratio((accepted > k).sum(), ((accepted >= k) & (proposed > k)).sum()) for k in positions),
        limit_share=_ratio(sum(c.finish_reason == "length" for c in completions), len(completions)) or 0.0,
        loop_share=_ratio(sum(loops(c.output_ids) for c in completions), len(completions)) or 0.0,
        by_context=_by_context(context, committed),
    )


def _scored(one: Round) -> int:
    return one.proposal_length if one.nodes is None else one.nodes


def _contexts(completion: Completion) -> list[int]:
    """The tokens of context at the beginning of each round. The first answer token comes from the prefill."""
    lengths = (r.acceptance_length for r in completion.rounds)
    return list(accumulate(lengths, initial=len(completion.prompt_ids) + 1))[: len(completion.rounds)]


def _by_context(context: np.ndarray, committed: np.ndarray) -> tuple[ContextBucket, ...]:
    buckets, start, end = [], 0, FIRST_BUCKET
    while len(context) and start <= context.max():
        inside = (context >= start) & (context < end)
        if inside.any():
            mean = float(committed[inside].mean())
            buckets.append(ContextBucket(start=start, end=end, rounds=int(inside.sum()), acceptance_length=mean))
        start, end = end, 2 * end
    return tuple(buckets)


def loops(output_ids: Sequence[int]) -> bool:
    """Whether the last LOOP_TAIL tokens repeat, with a period of at most a quarter of LOOP_TAIL."""
    tail = list(output_ids[-LOOP_TAIL:])
    if len(tail) < LOOP_TAIL:
        return False
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_TAIL // 4 + 1))


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def _interval(prompt: np.ndarray, committed: np.ndarray, num_prompts: int, seed: int) -> tuple[float, float] | None:
    """Percentile bootstrap of the pooled ratio, over prompts, because the rounds of one prompt are not independent."""
    if len(prompt) == 0:
        return None
    tokens = np.bincount(prompt, weights=committed, minlength=num_prompts)
    rounds = np.bincount(prompt, minlength=num_prompts)
    draws = np.random.default_rng(seed).integers(num_prompts, size=(BOOTSTRAP_DRAWS, num_prompts))
    drawn_rounds = rounds[draws].sum(1)
    drawn = tokens[draws].sum(1)[drawn_rounds > 0] / drawn_rounds[drawn_rounds > 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return (float(low), float(high))
