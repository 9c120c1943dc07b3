"""The difference of two accepted lengths on the same prompts: its value, and an interval that prompts do not widen."""

import numpy as np
import pytest

from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.evaluation.metrics import pool
from deepspec_core.evaluation.paired import paired_difference


def done(name: str, committed: list[int], prompt: tuple[int, ...] = (1,)) -> Completion:
    return Completion(
        id=name,
        prompt_ids=prompt,
        output_ids=tuple(range(sum(committed))),
        finish_reason="length",
        rounds=tuple(Round(8, count - 1, count) for count in committed),
    )


def test_it_is_the_difference_of_the_pooled_lengths() -> None:
    first = [done("a", [3, 5]), done("b", [1]), done("c", [])]
    second = [done("b", [2, 2]), done("c", [1]), done("a", [2])]
    found = paired_difference(first, second, seed=0)
    assert found is not None
    assert found.value == pytest.approx(9 / 3 - 7 / 4)
    assert found.interval[0] <= found.value <= found.interval[1]


def test_prompts_that_are_hard_for_both_do_not_widen_the_interval() -> None:
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 7, size=60)
    first = [done(str(i), [int(each) + 1] * 4) for i, each in enumerate(lengths)]
    second = [done(str(i), [int(each)] * 4) for i, each in enumerate(lengths)]
    found = paired_difference(first, second, seed=0)
    assert found is not None
    assert found.value == pytest.approx(1)
    assert found.interval == pytest.approx((1, 1))
    low, high = pool(first).acceptance_length_interval
    assert high - low > 0.5, "each by itself is far less certain"


def test_other_prompts_or_no_rounds_have_no_difference() -> None:
    first = [done("a", [3]), done("b", [2])]
    assert paired_difference(first, first[:1], seed=0) is None
    assert paired_difference(first, [done("a", [3]), done("b", [2], prompt=(2,))], seed=0) is None
    assert paired_difference(first, [done("a", [3]), done("c", [2])], seed=0) is None
    assert paired_difference(first, [done("a", []), done("b", [])], seed=0) is None
    assert paired_difference([], [], seed=0) is None
