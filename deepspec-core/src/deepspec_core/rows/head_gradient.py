"""The gradient of a vocabulary head, gathered from chunks of rows.

A trained head's gradient is as large as the head, so it costs memory and time beside the logits. Three things keep that
low. It is never filled with zeros first. It is gone over in slabs that fit the processor's caches. Where one chunk has
all rows, nothing is added up outside the product, and the gradient keeps the product's dtype. Knows gradients of
products and rows; not which head they belong to.

Legend: V vocabulary, X width of the head, N rows of a chunk, S rows of a slab of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec_core.rows.large_buffer import large_buffer

# Entries of a slab: what a core's cache holds on CPU; elsewhere, what keeps a device busy and is still small.
_CPU_SLAB, _SLAB = 1 << 20, 1 << 24


class HeadGradient:
    """`add` each chunk's share; `sum` is [V, X]."""

    def __init__(self, head_VX: Tensor, dtype: torch.dtype) -> None:
        """`dtype` is that of products where one share comes, and wider where several are to be summed."""
        self._sum_VX = large_buffer(*head_VX.shape, dtype=dtype, device=head_VX.device)
        self._empty = True

    def add(self, of_product_NV: Tensor, row_NX: Tensor) -> None:
        """The share of rows whose products with the head have these gradients."""
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


def scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient [V, X] or [N, X] or [N], times `by` [], in `dtype`; it need not be there three times for that."""
    result = large_buffer(*gradient.shape, dtype=dtype, device=gradient.device)
    size = _slab_rows(gradient)
    for part, into in zip(torch.split(gradient, size), torch.split(result, size), strict=True):
        into.copy_(part * by)
    return result


def _slab_rows(tensor: Tensor) -> int:
    entries = _CPU_SLAB if tensor.device.type == "cpu" else _SLAB
    return max(1, entries // max(1, tensor[:1].numel()))
