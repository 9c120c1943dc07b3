"""Compares the rows of conversations that are packed into one row of a batch with the rows of each conversation alone.

This file knows packing. It does not know which draft is tested.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepspec_core.contracts.draft import DraftModel, PreparedSample
from deepspec_core.testing.conformance import require
from deepspec_core.testing.placed_rows import same_rows
from deepspec_core.testing.random_batches import padded_batch

# The longest conversation has one before it and one after it, and the shorter row of the batch ends in padding.
_ROWS = ((1, 0, 3), (2,))


def packed_as_alone(draft: DraftModel, prepared: Sequence[PreparedSample], near: float) -> None:
    """Raise Unmet if four conversations, packed into two rows, give other rows than each in a row of its own."""
    packed = draft(padded_batch(draft, prepared, rows=_ROWS, extra=5))
    alone = draft(padded_batch(draft, [prepared[index] for row in _ROWS for index in row]))
    same_rows(packed, alone, "conversations that share a row, beside each in a row of its own", near)
    if packed.denominator is not None and alone.denominator is not None:
        mine, theirs = float(packed.denominator), float(alone.denominator)
        require(torch.isclose(packed.denominator, alone.denominator), f"denominator {mine:g} packed, {theirs:g} alone")
