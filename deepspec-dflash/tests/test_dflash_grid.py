"""The grid of a batch: every block has a place, and sequences with fewer blocks have places without context."""

from __future__ import annotations

import torch

from deepspec_core.testing.random_batches import random_sample
from deepspec_dflash.grid import GridPreparation


def test_the_grid_has_a_place_for_every_block() -> None:
    preparation = GridPreparation(num_predictions=3, num_anchors=4)
    samples = [random_sample("a", 10, seed=1), random_sample("b", 6, [0] * 6), random_sample("c", 7, seed=2)]
    anchors = [[2, 3, 8], [], [2, 4]]
    prepared = [preparation.at(s, torch.tensor(a, dtype=torch.long)) for s, a in zip(samples, anchors, strict=True)]
    batch = preparation.collate(prepared)
    assert batch["grid_anchors"].tolist() == [[2, 3, 8], [0, 0, 0], [2, 4, 0]]
    assert batch["grid"].flatten()[batch["place"]].tolist() == [0, 1, 2, 3, 4]
    alone = preparation.collate(prepared[1:2])
    assert (alone["grid"].tolist(), alone["place"].tolist()) == ([[0]], [0])
    assert not len(alone["block"]), "one block, which yields no row"
