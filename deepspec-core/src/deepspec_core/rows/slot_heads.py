"""Products of rows with a vocabulary head: one head for all rows, or one for each slot.

With one head for each slot, the rows of each slot are multiplied by its head, and put back in the order of rows. Knows
slots and heads. Does not know which head it is, or the sums of gradients.

Legend: N rows of a chunk, G slots, V vocabulary, X width of the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec_core.rows.host_side import sent

# A slot, and its rows in the chunk.
Group = tuple[int, Tensor]


def groups_of(slot_N: Tensor, device: torch.device) -> Sequence[Group]:
    """The rows of each slot that occurs, on `device`. The slots are on the host."""
    order_N = torch.argsort(slot_N, stable=True)
    slots_S, counts_S = torch.unique_consecutive(slot_N[order_N], return_counts=True)
    slots, counts = torch.stack((slots_S, counts_S)).tolist()
    return list(zip(slots, torch.split(sent(order_N, device), counts), strict=True)) if slots else []


def multiply(row_NX: Tensor, head: Tensor, groups: Sequence[Group], *, out: Tensor, add: bool = False) -> Tensor:
    """The products of rows with `head` [V, X], or of each row with its slot's of [G, V, X], in or added to `out`."""
    if head.dim() == 2:
        return out.addmm_(row_NX, head.mT) if add else torch.mm(row_NX, head.mT, out=out)
    for slot, rows_n in groups:
        product_nV = row_NX[rows_n] @ head[slot].mT
        if add:
            out.index_add_(0, rows_n, product_nV)
        else:
            out.index_copy_(0, rows_n, product_nV)
    return out


def gradient_of_rows(of_product_NV: Tensor, head: Tensor, groups: Sequence[Group]) -> Tensor:
    """The gradient of the rows, [N, X], whose products with the head have these gradients."""
    if head.dim() == 2:
        return of_product_NV @ head
    found_NX = of_product_NV.new_empty(len(of_product_NV), head.shape[-1])
    for slot, rows_n in groups:
        found_NX.index_copy_(0, rows_n, of_product_NV[rows_n] @ head[slot])
    return found_NX
