"""Which samples make up a step, and their random numbers, do not depend on ranks, micro-batches or the past."""

from __future__ import annotations

import math

import pytest

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
def test_shares_are_a_partition_of_the_step(world_size: int, micro_batch_size: int) -> None:
    sampler = batches()
    for step in range(9):
        shares = [
            sampler.share(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
            for rank in range(world_size)
        ]
        assert sorted(index for share in shares for micro in share for index in micro) == sorted(sampler.indices(step))
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert all(1 <= len(micro) <= micro_batch_size for share in shares for micro in share)


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
