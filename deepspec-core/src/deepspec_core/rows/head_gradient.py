"""The gradient of a vocabulary head, summed over chunks of rows.

The gradient of a trained head is as large as the head, so its memory and time matter. Three things keep them low. The
gradient is never filled with zeros first. It is computed in slabs that fit the processor's caches. If one chunk has all
rows, the product alone gives the sum, and the gradient keeps the product's dtype. Knows gradients of products and rows.
Does not know which head they belong to.

Legend: V vocabulary, G slots, X width of the head, N rows of a chunk, S rows of a slab of the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec_core.rows.large_buffer import large_buffer
from deepspec_core.rows.slot_heads import Group

# Entries of a slab. On a CPU a slab fits a core's cache. On other devices it is large enough to keep them busy.
_CPU_SLAB, _SLAB = 1 << 20, 1 << 24


class HeadGradient:
    """The gradient of one head. `add` takes each chunk's share; `sum` is [V, X]."""

    def __init__(self, sum_VX: Tensor) -> None:
        """`sum_VX` is where the sum is made; what it holds does not matter."""
        self._sum_VX = sum_VX
        self._empty = True

    def add(self, of_product_NV: Tensor, row_NX: Tensor, _groups: Sequence[Group] = ()) -> None:
        """Add the share of rows whose products with the head have these gradients."""
        if self._sum_VX.dtype == row_NX.dtype and self._empty:
            torch.mm(of_product_NV.mT, row_NX, out=self._sum_VX)
        else:
            self._add_slabs(of_product_NV, row_NX)
        self._empty = False

    def _add_slabs(self, of_product_NV: Tensor, row_NX: Tensor) -> None:
        size = _slab_rows(self._sum_VX)
        slabs = zip(torch.split(of_product_NV, size, dim=1), torch.split(self._sum_VX, size), strict=True)
        for of_product_NS, into_SX in slabs:
            share_SX = of_product_NS.mT @ row_NX
            if self._empty:
                into_SX.copy_(share_SX)
            else:
                into_SX.add_(share_SX)

    @property
    def sum(self) -> Tensor:
        return self._sum_VX.zero_() if self._empty else self._sum_VX


class SlotHeadsGradient:
    """The gradient of heads a slot. `sum` is [G, V, X]."""

    def __init__(self, sum_GVX: Tensor) -> None:
        self._sum_GVX = sum_GVX
        self._parts = [HeadGradient(sum_VX) for sum_VX in sum_GVX]

    def add(self, of_product_NV: Tensor, row_NX: Tensor, groups: Sequence[Group]) -> None:
        """Add the share of rows whose products with their slots' heads have these gradients."""
        for slot, rows_n in groups:
            self._parts[slot].add(of_product_NV[rows_n], row_NX[rows_n])

    @property
    def sum(self) -> Tensor:
        for part in self._parts:
            _ = part.sum  # slots without rows become zero
        return self._sum_GVX


def head_gradient(head: Tensor, dtype: torch.dtype) -> HeadGradient | SlotHeadsGradient:
    """The gradient of `head` [V, X] or [G, V, X], still without a share.

    `dtype` is that of the products if there is one chunk, and wider if the shares of several are summed.
    """
    made = large_buffer(*head.shape, dtype=dtype, device=head.device)
    return HeadGradient(made) if head.dim() == 2 else SlotHeadsGradient(made)


def scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient` [G, V, X], [V, X], [N, X] or [N] times `by` [], in `dtype`, without two more tensors of its size."""
    if gradient.dim() == 3:
        return scaled(gradient.flatten(0, 1), by, dtype).view(gradient.shape)
    result = large_buffer(*gradient.shape, dtype=dtype, device=gradient.device)
    size = _slab_rows(gradient)
    for part, into in zip(torch.split(gradient, size), torch.split(result, size), strict=True):
        into.copy_(part * by)
    return result


def add_scaled(gradient: Tensor, by: Tensor, *, into: Tensor) -> None:
    """Add `gradient` [G, V, X] or [V, X] times `by` [] to `into`, of the same shape, without a tensor of its size."""
    if gradient.dim() == 3:
        gradient, into = gradient.flatten(0, 1), into.flatten(0, 1)
    size = _slab_rows(gradient)
    for part, into_part in zip(torch.split(gradient, size), torch.split(into, size), strict=True):
        into_part.add_(part * by)


def _slab_rows(tensor: Tensor) -> int:
    entries = _CPU_SLAB if tensor.device.type == "cpu" else _SLAB
    return max(1, entries // max(1, tensor[:1].numel()))
