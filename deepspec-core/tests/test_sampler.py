"""Which samples make up a step, and their random numbers, do not depend on ranks, micro-batches or the past."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deepspec_core.training.epoch_order import Order, bucketed, shuffled
from deepspec_core.training.loader import StepPlans
from deepspec_core.training.packing import packed_rows
from deepspec_core.training.sampler import GlobalBatches, sample_rng
from deepspec_core.training.schedule import learning_rate

LENGTHS = [3, 9, 4, 4, 7, 1, 8, 2, 6, 5, 5]


def batches(seed: int = 0) -> GlobalBatches:
    return GlobalBatches(LENGTHS, global_batch_size=4, epochs=3, seed=seed)


def test_every_epoch_visits_every_sample_once() -> None:
    sampler = batches()
    assert (sampler.steps_per_epoch, sampler.total_steps) == (3, 9)
    orders = []
    for epoch in range(3):
        steps = [sampler.indices(epoch * 3 + step) for step in range(3)]
        assert [len(step) for step in steps] == [4, 4, 3]
        assert sorted(index for step in steps for index in step) == list(range(11))
        orders.append(steps)
    assert orders[0] != orders[1] != orders[2]


def test_a_step_can_be_asked_for_at_any_time() -> None:
    forward, backward = batches(), batches()
    expected = [forward.indices(step) for step in range(9)]
    assert [backward.indices(step) for step in reversed(range(9))] == expected[::-1]
    assert [batches(seed=1).indices(step) for step in range(9)] != expected


def test_epochs_are_seeded_with_seed_plus_epoch() -> None:
    assert [batches(seed=5).indices(3 + step) for step in range(3)] == [batches(seed=6).indices(s) for s in range(3)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
@pytest.mark.parametrize("row_tokens", [None, 9])
def test_plans_are_a_partition_of_the_step(world_size: int, micro_batch_size: int, row_tokens: int | None) -> None:
    """With rows or without: which samples a step has does not depend on how they are laid out, nor on ranks."""
    sampler = batches()
    ranks = [
        StepPlans(
            sampler,
            range(9),
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            row_tokens=row_tokens,
        )
        for rank in range(world_size)
    ]
    for step in range(9):
        live = [[plan for plan in plans.of_step(step) if plan.live] for plans in ranks]
        assert sorted(i for plans in live for plan in plans for i in plan.indices) == sorted(sampler.indices(step))
        sizes = [sum(len(plan.indices) for plan in plans) for plans in live]
        assert max(sizes) - min(sizes) <= 1
        for plan in (plan for plans in live for plan in plans):
            if row_tokens is None:
                assert plan.row_sizes is None
                assert 1 <= len(plan.indices) <= micro_batch_size
            else:
                assert plan.row_sizes is not None
                assert sum(plan.row_sizes) == len(plan.indices)
                assert 1 <= len(plan.row_sizes) <= micro_batch_size


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_sample_once_and_are_about_as_full(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 1000, size=300).tolist()
    chosen = list(range(0, 300, 2))
    rows = packed_rows(chosen, lengths, 1000)
    assert sorted(index for row in rows for index in row) == chosen
    sizes = [sum(lengths[index] for index in row) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= 1000
    assert len(rows) <= 1.1 * sum(sizes) / 1000
    padded = sum(len(sizes[at : at + 4]) * sizes[at] for at in range(0, len(sizes), 4))
    assert sum(sizes) > 0.95 * padded, "rows of a micro-batch are about as full"
    assert packed_rows(chosen[::-1], lengths, 1000) == rows


def test_a_sample_longer_than_a_row_has_one_of_its_own() -> None:
    assert packed_rows([0, 1, 2, 3], [30, 4, 5, 6], 10) == [[0], [2, 1], [3]]
    assert packed_rows([2], [30, 4, 5], 10) == [[2]]


def test_buckets_hold_samples_of_like_length_and_differ_by_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, size=8 * 50 + 3).tolist()

    def steps(order: Order) -> list[list[list[int]]]:
        """By epoch; the last step, which is not whole, apart."""
        sampler = GlobalBatches(lengths, global_batch_size=8, epochs=2, seed=0, order=order)
        assert sampler.steps_per_epoch == 51
        return [[sampler.indices(51 * epoch + step) for step in range(51)] for epoch in range(2)]

    def spread(epoch: list[list[int]]) -> float:
        return float(np.mean([max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in epoch[:-1]]))

    found, mixed = steps(bucketed), steps(shuffled)
    for epoch in found:
        assert sorted(index for step in epoch for index in step) == list(range(len(lengths)))
        assert [len(step) for step in epoch] == [8] * 50 + [3]
        longest = [max(lengths[index] for index in step) for step in epoch[:-1]]
        assert longest != sorted(longest, reverse=True)
    assert spread(found[0]) < 0.2 * spread(mixed[0])
    assert {frozenset(step) for step in found[0]}.isdisjoint(frozenset(step) for step in found[1])
    assert bucketed([5, 6], 8, torch.Generator()).tolist() in ([0, 1], [1, 0])


def test_sequences_of_like_length_are_together() -> None:
    lengths = [LENGTHS[index] for index in batches().indices(0)]
    assert lengths == sorted(lengths, reverse=True)


def test_a_samples_random_numbers_are_its_own() -> None:
    def draw(*key: object) -> list[int]:
        return sample_rng(*key).integers(0, 1 << 62, size=4).tolist()  # type: ignore[arg-type, no-any-return]

    assert draw(1, 2, "a") == draw(1, 2, "a")
    others = [draw(1, 2, "b"), draw(1, 3, "a"), draw(2, 2, "a"), draw(12, 3, "a"), draw(1, 23, "a")]
    assert draw(1, 2, "a") not in others
    assert others[3] != others[4]


def test_learning_rate() -> None:
    rates = [learning_rate(step, peak=2.0, total_steps=100, warmup=0.04) for step in range(100)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[52] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.001
    assert learning_rate(0, peak=2.0, total_steps=10, warmup=0.0) == 2.0
    assert learning_rate(9, peak=2.0, total_steps=10, warmup=1.0) == 2.0
    assert math.isclose(learning_rate(0, peak=2.0, total_steps=1, warmup=0.04), 2.0)
