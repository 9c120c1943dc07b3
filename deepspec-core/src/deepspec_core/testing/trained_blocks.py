"""The block of training that predicts what a draft proposes after a position, and the text that training is given.

Knows rows, samples and features. Does not know how blocks are prepared.
"""

from __future__ import annotations

from typing import Any

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.rows import Rows
from deepspec_core.testing.placed_rows import placed
from deepspec_core.testing.random_batches import features_of


def block_after(rows: Rows, sample: Sample, at: int, count: int) -> list[int] | None:
    """The rows that predict the tokens after position `at`, of the block that begins there; None if not drawn."""
    where = placed(rows, [sample])
    by_block: dict[int, list[int]] = {}
    for row in range(len(rows.hidden)):
        by_block.setdefault(int(rows.block[row]), []).append(row)
    for found in by_block.values():
        if [where[row][1] for row in found][:count] == list(range(at, at + count)):
            return found[:count]
    return None


def wide(text: Sample, known: Sample) -> Any:
    """The features that decoding was given, in the width of training."""
    given, full = features_of(text), features_of(known)
    return (
        given
        if given.hidden.shape == full.hidden.shape
        else type(full)(hidden=full.hidden, last_hidden=given.last_hidden)
    )
