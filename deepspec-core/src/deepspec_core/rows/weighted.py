"""Rows without those that weigh 0. Such a row is not there: what its tensors hold, NaN for example, reaches nothing.

0 times NaN is NaN, in a sum and in every product of a gradient. So these rows are taken out before any logits are
formed. Knows rows. Does not know chunks, kernels or terms.

Legend: N rows.
"""

from __future__ import annotations

from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.rows import Rows


def weighted(rows: Rows) -> Rows:
    """The rows whose own weight is not 0; `rows` itself if that is all of them. Autograd gives the others zeros.

    Waits for the device.
    """
    kept_N = rows.weight.nonzero()[:, 0]
    if len(kept_N) == len(rows.weight):
        return rows

    def kept(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, kept_N)

    return evolve(
        rows,
        hidden=kept(rows.hidden),
        correction=None if rows.correction is None else kept(rows.correction),
        target_index=None if rows.target_index is None else kept(rows.target_index),
        target_ids=None if rows.target_ids is None else kept(rows.target_ids),
        weight=kept(rows.weight),
        slot=kept(rows.slot),
        block=kept(rows.block),
        extras={name: kept(extra) for name, extra in rows.extras.items()},
    )
