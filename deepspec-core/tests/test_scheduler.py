"""Algorithm 1: its counterexample, its definition restated, and that no token is decided on by itself or later ones."""

import random
from itertools import product

import pytest

from deepspec_core.decoding.scheduler import (
    LAG,
    AsynchronousScheduler,
    admit,
    before_first_below,
    most_probable,
    survival,
)

# The counterexample: one request, tokens A and B.
TARGET = {"A": 0.7, "B": 0.3}
DRAFT = {"A": 0.5, "B": 0.5}
SPEED = {1: 1.0, 2: 0.5, 3: 0.45}


def output_is_a(*, early_stop: bool) -> float:
    """The probability that the first token of the output is A, over the draft's first token, exactly."""
    total = 0.0
    for first, probability in DRAFT.items():
        second = 0.9 if first == "A" else 0.0
        (length,) = admit(survival([[0.8, second]]), SPEED.__getitem__, early_stop=early_stop)
        if length == 0:
            total += probability * TARGET["A"]
            continue
        accepted = min(1.0, TARGET[first] / DRAFT[first])
        rest = {token: max(0.0, TARGET[token] - DRAFT[token]) for token in TARGET}
        resampled = rest["A"] / sum(rest.values())
        total += probability * (accepted * (first == "A") + (1 - accepted) * resampled)
    return total


def test_the_counterexample() -> None:
    """A search among all counts lets the second token decide about the first, and A comes too often."""
    assert output_is_a(early_stop=False) == pytest.approx(0.85)
    assert output_is_a(early_stop=True) == pytest.approx(0.7)


def random_case(seed: int) -> tuple[list[list[float]], dict[int, float]]:
    rng = random.Random(seed)
    # Few different values, so that equal survivals and zeros occur.
    confidences = [
        [rng.choice((0.0, 0.25, 0.5, 0.75, 1.0)) for _ in range(rng.randint(0, 4))] for _ in range(rng.randint(1, 4))
    ]
    slowdown = rng.choice((0.02, 0.1, 0.3))
    return confidences, {b: 1 / (1 + slowdown * b * rng.uniform(0.8, 1.2)) for b in range(1, 21)}


def rate(survivals: list[list[float]], lengths: tuple[int, ...] | list[int], speed: dict[int, float]) -> float:
    expected = len(survivals) + sum(sum(own[:n]) for own, n in zip(survivals, lengths, strict=True))
    return expected * speed[len(survivals) + sum(lengths)]


@pytest.mark.parametrize("seed", range(60))
def test_a_search_among_all_counts_is_the_best_there_is(seed: int) -> None:
    confidences, speed = random_case(seed)
    survivals = survival(confidences)
    found = admit(survivals, speed.__getitem__, early_stop=False)
    # Tokens that cannot survive are never verified.
    every = product(*(range(sum(value > 0 for value in own) + 1) for own in survivals))
    assert rate(survivals, found, speed) == pytest.approx(max(rate(survivals, lengths, speed) for lengths in every))


@pytest.mark.parametrize("seed", range(60))
def test_the_early_stop_ends_at_the_first_token_that_does_not_pay(seed: int) -> None:
    confidences, speed = random_case(seed)
    survivals = survival(confidences)
    found = admit(survivals, speed.__getitem__)
    every = sorted(
        ((value, k, r) for r, own in enumerate(survivals) for k, value in enumerate(own) if value > 0),
        key=lambda one: (-one[0], one[1], one[2]),
    )
    lengths = [0] * len(survivals)
    for _, k, r in every:
        longer = [n + (i == r) for i, n in enumerate(lengths)]
        if rate(survivals, longer, speed) <= rate(survivals, lengths, speed):
            break
        assert lengths[r] == k, "a prefix is never broken"
        lengths = longer
    assert found == lengths


@pytest.mark.parametrize("seed", range(60))
def test_no_token_is_admitted_by_what_comes_after_it(seed: int) -> None:
    """Whatever the confidences of later tokens of its request are, the decision about a token stays."""
    confidences, speed = random_case(seed)
    rng = random.Random(seed + 1000)
    found = admit(survival(confidences), speed.__getitem__)
    for request, own in enumerate(confidences):
        for k in range(len(own)):
            other = [list(one) for one in confidences]
            other[request][k + 1 :] = [rng.random() for _ in own[k + 1 :]]
            again = admit(survival(other), speed.__getitem__)
            assert (again[request] > k) == (found[request] > k)


def test_without_requests_or_proposals() -> None:
    assert admit([], lambda _: 1.0) == []
    assert admit([[], []], lambda _: 1.0) == [0, 0]


def test_the_most_probable_tokens_keep_prefixes() -> None:
    survivals = survival([[0.9, 0.9, 0.9], [0.8, 1.0, 0.0], []])
    assert most_probable(survivals, 0) == [0, 0, 0]
    assert most_probable(survivals, 3) == [2, 1, 0]
    assert most_probable(survivals, 99) == [3, 2, 0]


def test_the_asynchronous_form_takes_its_number_from_earlier_steps() -> None:
    scheduler = AsynchronousScheduler()
    sure, unsure = survival([[0.99, 0.99, 0.99]]), survival([[0.1, 0.1, 0.1]])
    speed = {1: 1.0, 2: 0.9, 3: 0.8, 4: 0.7}.__getitem__
    assert admit(sure, speed) == [3]
    assert admit(unsure, speed) == [0]
    found = [scheduler.admit(step, speed) for step in (sure, unsure, unsure, sure, sure)]
    assert LAG == 2
    assert found == [[0], [0], [3], [0], [0]]


def test_a_threshold_ends_at_the_first_token_below_it() -> None:
    assert before_first_below([[0.9, 0.4, 0.9], [0.5], [], [0.1]], 0.5) == [1, 1, 0, 0]
