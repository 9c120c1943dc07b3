"""The difference of two accepted lengths on the same prompts: its value, and an interval that prompts do not widen."""

import numpy as np
import pytest

from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.evaluation.metrics import pool
from deepspec_core.evaluation.paired import Difference, NoDifference, paired_difference


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
    assert isinstance(found, Difference)
    assert found.value == pytest.approx(9 / 3 - 7 / 4)
    assert found.interval[0] <= found.value <= found.interval[1]


def test_prompts_that_are_hard_for_both_do_not_widen_the_interval() -> None:
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 7, size=60)
    first = [done(str(i), [int(each) + 1] * 4) for i, each in enumerate(lengths)]
    second = [done(str(i), [int(each)] * 4) for i, each in enumerate(lengths)]
    found = paired_difference(first, second, seed=0)
    assert isinstance(found, Difference)
    assert found.value == pytest.approx(1)
    assert found.interval == pytest.approx((1, 1))
    low, high = pool(first).acceptance_length_interval
    assert high - low > 0.5, "each by itself is far less certain"


def test_other_prompts_or_no_rounds_have_no_difference() -> None:
    first = [done("a", [3]), done("b", [2])]
    for second, reason in (
        ([done("a", [3]), done("b", [2], prompt=(2,))], "other tokens"),
        ([done("c", [3])], "no prompt that both"),
        ([], "no prompt that both"),
        ([done("a", []), done("b", [])], "no rounds"),
    ):
        found = paired_difference(first, second, seed=0)
        assert isinstance(found, NoDifference)
        assert reason in found.reason


def test_later_turns_follow_each_drafts_own_answers() -> None:
    first = [done("a", [3]), done("a (turn 2)", [5], prompt=(1, 7)), done("b", [2])]
    second = [done("a", [1]), done("a (turn 2)", [2], prompt=(1, 8)), done("b", [2]), done("b (turn 2)", [4])]
    found = paired_difference(first, second, seed=0)
    assert isinstance(found, Difference)
    assert found.value == pytest.approx(10 / 3 - 9 / 4)
    assert (found.prompts, found.left_out) == (2, 0)


def test_prompts_that_one_lacks_are_left_out_and_counted() -> None:
    first = [done("a", [3]), done("b", [4]), done("c", [9])]
    second = [done("a", [1]), done("b", [2]), done("d", [9])]
    found = paired_difference(first, second, seed=0)
    assert isinstance(found, Difference)
    assert found.value == pytest.approx(2)
    assert (found.prompts, found.left_out) == (2, 2)
    several = [done("a (sample 2)", [3]), *first]
    again = paired_difference(several, second, seed=0)
    assert isinstance(again, Difference)
    assert again.value == pytest.approx(10 / 3 - 3 / 2)
