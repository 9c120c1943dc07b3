"""Which predictions of a sample count: by labels as in decoding, and at drawn positions."""

import numpy as np
import pytest
import torch

from deepspec_core.testing.random_batches import random_sample
from deepspec_eagle3.options import Count
from deepspec_eagle3.preparation import StepPreparation, counted_steps

MASK = [0, 0, 1, 1, 1, 0, 1, 1, 0]


def _preparation(count: Count = "published", num_anchors: int | None = None) -> StepPreparation:
    return StepPreparation(num_steps=3, step_decay=0.8, normaliser="sequence", count=count, num_anchors=num_anchors)


def test_labels_by_hand() -> None:
    """A proposal begins at its anchor, q + 1, and every token up to its label, q + 2 + s, is of the same answer."""
    assert counted_steps(torch.tensor(MASK), 3, "labels").int().tolist() == [
        [0, 0, 0],
        [1, 1, 0],  # the first proposal after a prompt: its tap is at the last prompt token
        [1, 0, 0],
        [0, 0, 0],  # its label is past the answer's end
        [0, 0, 0],
        [1, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]
    published = counted_steps(torch.tensor(MASK), 3)
    assert not published[1, 0], "the published code leaves the first proposal after a prompt out"
    assert published[3:5, 0].all(), "and counts past the end"


@pytest.mark.parametrize("count", ["published", "labels"])
def test_few_positions_are_drawn_anew_and_stand_for_all(count: Count) -> None:
    sample = random_sample("a", 40, [0] * 8 + [1] * 30 + [0, 0])
    everything = _preparation(count).prepare(sample, np.random.default_rng(0)).tensors
    assert everything["weigh"] == 1.0
    rng, preparation = np.random.default_rng(1), _preparation(count, num_anchors=5)
    all_rows = set(zip(everything["index"].tolist(), everything["step"].tolist(), strict=True))
    total, seen = torch.zeros(40, 3, dtype=torch.float64), set()
    draws = 400
    for _ in range(draws):
        drawn = preparation.prepare(sample, rng).tensors
        rows = list(zip(drawn["index"].tolist(), drawn["step"].tolist(), strict=True))
        indices = {index for index, _ in rows}
        assert len(indices) == 5
        # Of a drawn index every step that counts is there, in the order of all.
        assert rows == sorted(row for row in all_rows if row[0] in indices)
        total[drawn["index"], drawn["step"]] += drawn["weigh"]
        seen.add(tuple(sorted(indices)))
    assert len(seen) > draws // 2
    # On average each prediction weighs what it weighs where all are trained at.
    means = total[everything["index"], everything["step"]] / draws
    assert means.mean() == pytest.approx(1.0, abs=0.02)
    assert means.min() > 0.5
    assert means.max() < 1.6


def test_samples_with_fewer_positions_are_taken_whole() -> None:
    sample = random_sample("a", 9, MASK)
    few, whole = (
        _preparation("labels", number).prepare(sample, np.random.default_rng(0)).tensors for number in (50, None)
    )
    assert all(torch.equal(few[name], whole[name]) for name in whole)


def test_weights_and_rows_follow() -> None:
    samples = [random_sample("a", 40, [0] * 8 + [1] * 32), random_sample("b", 9, MASK)]
    preparation = _preparation("labels", num_anchors=4)
    rng = np.random.default_rng(3)
    batch = preparation.collate([preparation.prepare(sample, rng) for sample in samples])
    first = batch["document"] == 0
    # 31 positions of the first sample have a label in its answer; 4 of them are drawn. The second has 3, all taken.
    torch.testing.assert_close(
        batch["weight"][first], (0.8 ** batch["step"][first] * 31 / 4 / 40).float(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(batch["weight"][~first], (0.8 ** batch["step"][~first] / 9).float(), rtol=1e-6, atol=0)
    assert len(batch["later_index"]) <= 4 + 3
