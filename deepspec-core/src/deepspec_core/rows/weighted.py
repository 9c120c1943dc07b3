"""Removes rows of weight 0 before any logits are formed, so that their contents, such as NaN, affect nothing.

0 times NaN is NaN, in a sum and in every product of a gradient. Multiplication by the weight would therefore not be
enough. Knows rows. Does not know chunks, kernels or terms.

Legend: N rows.
"""

from __future__ import annotations

from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.rows import Rows
from deepspec_core.rows.host_side import host_side, sent, with_host_side


def weighted(rows: Rows) -> Rows:
    """The rows whose own weight is not 0, with `on_host` complete (host_side.py). Autograd gives the others zeros."""
    rows = with_host_side(rows)
    host = host_side(rows)
    host_kept_N = host["weight"].nonzero()[:, 0]
    if len(host_kept_N) == len(rows.weight):
        return rows
    kept_N = sent(host_kept_N, rows.weight.device)

    def kept(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, kept_N)

    left = evolve(
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
    copies = {name: part.index_select(0, host_kept_N) if part.dim() else part for name, part in host.items()}
    return evolve(left, on_host=tuple((getattr(left, name), copy) for name, copy in copies.items()))
