"""Replays recorded rounds with a number of concurrent requests, under a cost table and a verification policy.

A request goes through the recorded rounds of a sample in order. In each step a policy decides how many of the round's
proposed tokens are verified. Of these, the tokens that were accepted in the record are committed, plus the target's own
token. A request ends when it has as many tokens as the recorded answer. Another request then takes its place, so the
number of requests is constant. Samples are taken in turn; after the last one, the first one follows again.

After a round that was cut short, the real draft would make another proposal than the next recorded one. That proposal
is not known, so the next recorded round is used instead; after the last round, the first one follows again. So the
replay is exact if all tokens are verified, and an estimate otherwise. This file knows rounds and costs. It does not
know files or models.
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

# At least this many requests are replayed, if there are as many samples; and MIN_TURNS times the concurrent requests.
MIN_REQUESTS = 64
MIN_TURNS = 4
# The gain that `admit` is given for a token that commits nothing: above 0, and too small to change a rate.
_NOTHING = 1e-300

Policy: TypeAlias = Callable[[Sequence[Round], Speed], Sequence[int]]
"""Returns, for each request's round, how many of its proposed tokens to verify. Called once per step."""


@frozen(kw_only=True)
class Outcome:
    """The result of replaying the record under a policy, at one number of concurrent requests.

    tokens_per_second: Committed tokens per second of all requests together; tokens_per_second_per_user: of one request.
    tokens_per_step: Tokens that one request commits per step.
    verified_per_step: Draft tokens of one request that the target verifies per step.
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
    """Makers of policies by name: each replay needs a new one. Policies that read confidences need `confidences`.

    The oracle counts the draft's time, `draft_seconds` per step. The schedulers count only the target's time, as
    decoding does.
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
    """Replay the samples, each of which has at least one round.

    `seconds` gives the time of a step by its number of tokens. Each step of a policy other than "none" takes
    `draft_seconds` more.
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
    """The samples that can be replayed: they have a round, and a token beyond the one that the prefill gives."""
    return [sample for sample in samples if sample.rounds and len(sample.output_ids) > 1]


def best_of_kinds(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best outcome of each kind of policy at each number of requests.

    All fixed lengths are one kind, and all thresholds are one kind. The fastest of a kind is kept.
    """
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
        # If the last accepted token ended the answer, this does not include the target's own token.
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
    """The best choice for a step if it were known what each token will commit: an upper bound for every policy.

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
