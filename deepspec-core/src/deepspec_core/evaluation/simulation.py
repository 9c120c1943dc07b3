"""Replays recorded rounds at a number of concurrent requests, under a cost table and a policy of verification.

A request goes through the recorded rounds of a sample in order. In each step a policy says how many of the round's
proposed tokens are verified. As many of them as were accepted in the record are committed, and the target's own token.
A request ends when it has as many tokens as the recorded answer. Another one takes its place, so the number of requests
is always the same; samples are taken in turn, again from the first after the last.

A round that was cut short would go on with another proposal than the next one recorded. That proposal is not known, and
the recorded round takes its place, from the first again after the last. So the replay is exact where all tokens are
verified, and an estimate elsewhere. Knows rounds and costs. Does not know files or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import TypeAlias

from attrs import define, frozen

from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.decoding.scheduler import AsynchronousScheduler, Speed, admit, before_first_below, survival

# At least so many requests are replayed, if there are as many samples; and MIN_TURNS times the concurrent ones.
MIN_REQUESTS = 64
MIN_TURNS = 4
# What `admit` takes for a token that commits nothing: above 0, and too little to change a rate.
_NOTHING = 1e-300

Policy: TypeAlias = Callable[[Sequence[Round], Speed], Sequence[int]]
"""The number of tokens to verify of each request's round, at most as many as it proposes. Called once a step."""


@frozen(kw_only=True)
class Outcome:
    """What a policy makes of the record at one number of concurrent requests.

    tokens_per_second: Committed tokens of all requests; tokens_per_second_per_user those of one.
    tokens_per_step: Committed tokens of a request in a step.
    verified_per_step: Draft tokens of a request that the target verifies in a step.
    """

    policy: str
    requests: int
    tokens_per_second: float
    tokens_per_second_per_user: float
    tokens_per_step: float
    verified_per_step: float
    steps: int
    tokens: int
    seconds: float


@define
class _Request:
    rounds: Sequence[Round]
    left: int
    at: int = 0


def policies(
    num_tokens: int, thresholds: Sequence[float], *, confidences: bool, draft_seconds: float = 0.0
) -> dict[str, Callable[[], Policy]]:
    """The policies by name, made anew for each replay. Those that read confidences only if there are `confidences`.

    The oracle knows that a step takes `draft_seconds` more. The schedulers count the target's time, as decoding does.
    """
    made: dict[str, Callable[[], Policy]] = {"none": partial(_fixed, 0)}
    made |= {f"fixed {k}": partial(_fixed, k) for k in range(1, num_tokens + 1)}
    if confidences:
        made |= {f"threshold {value:g}": partial(_threshold, value) for value in thresholds}
        made |= {"scheduler": lambda: _scheduler, "asynchronous": _asynchronous}
    return {**made, "oracle": lambda: partial(_oracle, draft_seconds)}


def replay(
    samples: Sequence[Completion],
    policy: Policy,
    name: str,
    *,
    requests: int,
    seconds: Callable[[int], float],
    draft_seconds: float = 0.0,
) -> Outcome:
    """Replay the samples, each with at least one round.

    `seconds` is the time of a step with so many tokens. A step of any policy but "none" takes `draft_seconds` more.
    """
    supply = _supply(samples)
    active = [next(supply) for _ in range(requests)]
    to_finish = max(MIN_TURNS * requests, min(len(samples), MIN_REQUESTS))
    finished = steps = tokens = verified = 0
    elapsed = 0.0
    extra = 0.0 if name == "none" else draft_seconds

    def speed(batch: int) -> float:
        return 1 / seconds(batch)

    while finished < to_finish:
        rounds = [request.rounds[request.at % len(request.rounds)] for request in active]
        lengths = policy(rounds, speed)
        elapsed += seconds(requests + sum(lengths)) + extra
        steps += 1
        verified += sum(lengths)
        for slot, (request, one, length) in enumerate(zip(active, rounds, lengths, strict=True)):
            committed = min(_committed(one, length), request.left)
            tokens += committed
            request.left -= committed
            request.at += 1
            if request.left == 0:
                finished += 1
                active[slot] = next(supply)
    return Outcome(
        policy=name,
        requests=requests,
        tokens_per_second=tokens / elapsed,
        tokens_per_second_per_user=tokens / elapsed / requests,
        tokens_per_step=tokens / steps / requests,
        verified_per_step=verified / steps / requests,
        steps=steps,
        tokens=tokens,
        seconds=elapsed,
    )


def replayable(samples: Sequence[Completion]) -> list[Completion]:
    """The samples that have something to replay: a round, and a token beyond the one that prefill gives."""
    return [sample for sample in samples if sample.rounds and len(sample.output_ids) > 1]


def best_of_kinds(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """By number of requests, each kind of policy. Of the fixed numbers and of the thresholds, the fastest."""
    best: dict[tuple[int, str], Outcome] = {}
    for one in outcomes:
        place = (one.requests, one.policy.split()[0])
        if place not in best or one.tokens_per_second > best[place].tokens_per_second:
            best[place] = one
    return list(best.values())


def _supply(samples: Sequence[Completion]) -> Iterator[_Request]:
    for index in count():
        sample = samples[index % len(samples)]
        yield _Request(rounds=sample.rounds, left=len(sample.output_ids) - 1)


def _committed(one: Round, length: int) -> int:
    """The tokens that a round commits if only its first `length` ones are verified."""
    if length >= one.accepted_draft_length:
        # Without the target's own token if the last accepted one ended the answer.
        return one.acceptance_length
    return length + 1


def _fixed(length: int) -> Policy:
    return lambda rounds, _: [min(length, one.proposal_length) for one in rounds]


def _threshold(threshold: float) -> Policy:
    return lambda rounds, _: before_first_below(_confidences(rounds), threshold)


def _scheduler(rounds: Sequence[Round], speed: Speed) -> list[int]:
    return admit(survival(_confidences(rounds)), speed)


def _asynchronous() -> Policy:
    scheduler = AsynchronousScheduler()
    return lambda rounds, speed: scheduler.admit(survival(_confidences(rounds)), speed)


def _oracle(draft_seconds: float, rounds: Sequence[Round], speed: Speed) -> list[int]:
    """The best step of those who know what each token will commit. Nobody does: in a step no policy does better.

    Tokens that commit nothing are tried after all others, for tables in which a longer step takes less time.
    """
    known = [
        [max(_committed(one, k + 1) - _committed(one, k), _NOTHING) for k in range(one.proposal_length)]
        for one in rounds
    ]
    return admit(known, lambda tokens: 1 / (1 / speed(tokens) + draft_seconds), early_stop=False)


def _confidences(rounds: Sequence[Round]) -> list[list[float]]:
    return [[_sigmoid(logit) for logit in one.confidence or ()] for one in rounds]


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
