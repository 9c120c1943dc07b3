"""How many draft tokens of each request a step of the target verifies: Algorithm 1, its asynchronous form, a threshold.

The survival a[r, j] is the probability that the first j tokens of request r's proposal are all accepted: the product of
their confidences. Admitting one more token costs time for all requests and adds a[r, j] expected tokens. Nothing here
changes what the target outputs, as long as a token is admitted without regard to itself and the tokens after it. So the
search of Algorithm 1 stops at the first token that does not pay: looking further would let later tokens decide about
earlier ones.

Knows probabilities and costs. Does not know tokens, drafts or engines.

Legend: R requests; a request's list has an entry for each token that was proposed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import TypeAlias

Survival: TypeAlias = Sequence[Sequence[float]]
"""The survival of each request's proposed tokens, in order."""
Speed: TypeAlias = Callable[[int], float]
"""Steps a second of the target at so many tokens in the batch, each request's own last token included."""

# The asynchronous form takes its number of tokens from the confidences of this many steps earlier.
LAG = 2


def survival(confidences: Sequence[Sequence[float]]) -> list[list[float]]:
    """The products of each request's confidences."""
    return [list(accumulate(own, mul)) for own in confidences]


def admit(survivals: Survival, speed: Speed, *, early_stop: bool = True) -> list[int]:
    """How many tokens of each request to verify: those that raise the expected tokens a second.

    Tokens are tried in descending survival, equal ones by their position, so a request's tokens come in order. The
    search ends at the first token that does not raise the rate. Without `early_stop` all numbers of tokens are
    searched. This is not lossless if the survivals belong to the same tokens that are admitted.
    """
    order = _ordered(survivals)
    requests = len(survivals)
    tokens, expected = requests, float(requests)
    best, admitted = expected * speed(tokens) if requests else 0.0, 0
    for count, (value, _, _) in enumerate(order, start=1):
        tokens += 1
        expected += value
        rate = expected * speed(tokens)
        if rate > best:
            best, admitted = rate, count
        elif early_stop:
            break
    return _lengths(order[:admitted], requests)


def most_probable(survivals: Survival, count: int) -> list[int]:
    """How many tokens of each request to verify, if `count` in all: those with the highest survival above 0."""
    return _lengths(_ordered(survivals)[:count], len(survivals))


def before_first_below(confidences: Sequence[Sequence[float]], threshold: float) -> list[int]:
    """How many tokens of each request come before its first whose confidence is below the threshold."""
    return [next((k for k, value in enumerate(own) if value < threshold), len(own)) for own in confidences]


class AsynchronousScheduler:
    """Algorithm 1 without waiting for the current confidences: LAG steps ago they decided how many tokens to verify.

    The number comes from a search among all counts, which is lossless here because it does not depend on current
    tokens. The current confidences decide which tokens fill it. In the first LAG steps no number is known, and no token
    is verified.
    """

    def __init__(self) -> None:
        self._counts: deque[int] = deque(maxlen=LAG)

    def admit(self, survivals: Survival, speed: Speed) -> list[int]:
        """How many tokens of each request to verify in this step. To be called once a step."""
        count = self._counts[0] if len(self._counts) == LAG else 0
        self._counts.append(sum(admit(survivals, speed, early_stop=False)))
        return most_probable(survivals, count)


def _ordered(survivals: Survival) -> list[tuple[float, int, int]]:
    """(survival, position, request) of every token that may survive, in the order of admission."""
    every = [(value, k, r) for r, own in enumerate(survivals) for k, value in enumerate(own) if value > 0]
    return sorted(every, key=lambda one: (-one[0], one[1], one[2]))


def _lengths(admitted: Sequence[tuple[float, int, int]], requests: int) -> list[int]:
    lengths = [0] * requests
    for _, _, request in admitted:
        lengths[request] += 1
    return lengths
