"""Preparation: which anchors may be drawn, how evenly, which slots count, and how a batch is laid out."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from attrs import evolve

from deepspec_core.contracts.draft import Preparation
from deepspec_core.preparation.anchors import AnchorPreparation, anchor_candidates, counted_slots
from deepspec_core.testing.random_batches import random_sample

PREPARATION = AnchorPreparation(num_predictions=3, num_anchors=4)
#       0  1  2  3  4  5  6  7  8  9
MASK = [0, 0, 1, 1, 1, 0, 1, 0, 1, 1]


def _mask(*flags: int) -> torch.Tensor:
    return torch.tensor(flags, dtype=torch.bool)


def test_it_is_a_preparation_and_picklable() -> None:
    assert isinstance(PREPARATION, Preparation)
    assert pickle.loads(pickle.dumps(PREPARATION)) == PREPARATION


def test_candidates_need_two_supervised_tokens_in_a_row() -> None:
    assert anchor_candidates(_mask(*MASK)).tolist() == [2, 3, 8]
    assert anchor_candidates(_mask(1)).tolist() == []
    assert anchor_candidates(_mask(0, 1)).tolist() == []


def test_slots_count_as_a_prefix_up_to_gaps_and_the_end() -> None:
    found = counted_slots(torch.tensor([2, 3, 8]), _mask(*MASK), num_predictions=4)
    # 2: 3, 4 supervised, 5 not; 3: 4, then a gap (6 does not count again); 8: 9, then the end.
    assert found.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


def test_draws_are_increasing_distinct_and_even() -> None:
    sample = random_sample("a", 12)
    possible = anchor_candidates(sample.loss_mask)
    assert len(possible) == 10
    counts, rounds = torch.zeros(12), 4000
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        anchors = PREPARATION.prepare(sample, rng).tensors["anchors"]
        assert (anchors.diff() > 0).all()
        counts[anchors] += 1
    expected = rounds * 4 / 10
    assert counts[possible].sum() == rounds * 4
    deviation = (counts[possible] - expected).abs().max()
    assert deviation < 5 * (expected * 0.6) ** 0.5


def test_fewer_candidates_than_anchors_take_all_and_are_counted() -> None:
    prepared = PREPARATION.prepare(random_sample("a", 10, MASK), np.random.default_rng(0))
    assert prepared.tensors["anchors"].tolist() == [2, 3, 8]
    assert prepared.counts == {
        "anchor_candidates": 3,
        "anchors": 3,
        "counted_slots": 4,
        "samples_without_anchors": 0,
    }


def test_a_draft_that_reads_the_position_before_has_no_anchor_at_the_first() -> None:
    """A text whose first token is supervised: features of a draft of last hidden states begin after it."""
    sample = evolve(random_sample("a", 10), loss_mask=_mask(1, 1, 1, 0))
    for first, expected in ((0, [0, 1]), (1, [1])):
        prepared = evolve(PREPARATION, first=first).prepare(sample, np.random.default_rng(0))
        assert prepared.tensors["anchors"].tolist() == expected
        assert prepared.counts["anchor_candidates"] == len(expected)


def test_the_draw_depends_on_the_generator_alone() -> None:
    def draw(seed: int) -> list[int]:
        return (
            PREPARATION.prepare(random_sample("a", 60), np.random.default_rng([42, seed])).tensors["anchors"].tolist()
        )

    first = draw(1)
    assert draw(2) != first
    assert draw(1) == first


def test_labels_at_the_boundary() -> None:
    sample = random_sample("a", 10)
    prepared = PREPARATION.at(sample, torch.tensor([6, 8]))
    assert prepared.tensors["counted"].int().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert prepared.tensors["labels"][0].tolist() == sample.input_ids[7:10].tolist()
    assert prepared.tensors["labels"][1, 0] == sample.input_ids[9]


def test_collate_lists_live_blocks_and_counted_slots() -> None:
    samples = [random_sample("a", 10, MASK, seed=1), random_sample("b", 6, [0] * 6), random_sample("c", 7, seed=2)]
    anchors = [[2, 3, 8], [], [2, 4]]
    prepared = [PREPARATION.at(s, torch.tensor(a, dtype=torch.long)) for s, a in zip(samples, anchors, strict=True)]
    assert prepared[1].counts["samples_without_anchors"] == 1
    batch = PREPARATION.collate(prepared)
    assert batch["anchors"].tolist() == [2, 3, 8, 2, 4]
    assert batch["sequence"].tolist() == [0, 0, 0, 2, 2]
    assert batch["block"].tolist() == [0, 0, 1, 2, 3, 3, 3, 4, 4]
    assert batch["slot"].tolist() == [0, 1, 0, 0, 0, 1, 2, 0, 1]
    where = torch.stack([batch["target_sequence"], batch["target_position"]], 1)
    assert where.tolist() == [[0, 2], [0, 3], [0, 8], [2, 2], [2, 3], [2, 4], [2, 5]]
    assert where[batch["target_index"]][:, 1].tolist() == [2, 3, 3, 8, 2, 3, 4, 4, 5]
    expected = [samples[s].input_ids[p + 1].item() for s, p in where[batch["target_index"]].tolist()]
    assert batch["labels"].tolist() == expected
