"""Finds the block of training that predicts what a draft proposes after a position, and the text that training gets.

This file knows rows, samples and features. It does not know how blocks are prepared.
"""

from __future__ import annotations

from typing import Any

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.rows import Rows
from deepspec_core.testing.placed_rows import placed, ranges_of
from deepspec_core.testing.random_batches import features_of


def blocks_after(rows: Rows, sample: Sample, at: int, count: int) -> list[list[int]]:
    """The first `count` rows of the block that predicts the tokens after position `at`; empty if it was not drawn.

    Rows without target positions are found by their labels. Several blocks may have the same labels.
    """
    blocks = [range(first, last) for first, last in zip(*ranges_of(rows.block), strict=True)]
    if rows.target_hidden is None:
        assert rows.target_ids is not None, "rows without labels and without target positions"
        labels, right = rows.target_ids.tolist(), sample.input_ids[at + 1 : at + 1 + count].tolist()
        return [list(found[:count]) for found in blocks if [labels[row] for row in found[:count]] == right]
    where = placed(rows, [sample])
    right = list(range(at, at + count))
    return [list(found[:count]) for found in blocks if [where[row][1] for row in found[:count]] == right][:1]


def wide(text: Sample, known: Sample) -> Any:
    """The features that decoding was given, in the width that training uses."""
    given, full = features_of(text), features_of(known)
    return (
        given
        if given.hidden.shape == full.hidden.shape
        else type(full)(hidden=full.hidden, last_hidden=given.last_hidden)
    )
