"""The passes of formulas.py as Triton kernels, for GPUs. The formulas stand at the top of that file.

Every pass is a grid of programs (row, block of the vocabulary). A program reads its block once, in parallel, keeps it
in registers, and ends. So there are no loops to pipeline, and a few hundred rows keep a whole GPU busy. Where a pass
reduces over the vocabulary, each program writes the result of its block. These few numbers per row are then reduced in
a fixed order, without atomics, so the same input gives the same bits. Neighbouring programs work on neighbouring rows,
so those with the same target position find its logits in the L2 cache.

Only the grid depends on the number of rows, so a kernel is compiled once for a run's vocabulary, dtypes, cap and
options. Knows tensors and their layout. Does not know terms, rows or heads.

Legend: N rows of a chunk, M rows of any logits, U distinct target positions, V vocabulary, S blocks of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from deepspec_core.rows.kernels import triton_passes
from deepspec_core.rows.kernels.formulas import Distance, Divergence, Incoming, Logits, TargetRows

# Chosen by what kernels compile to for compute capability 9.0. Timing at start-up would let runs differ. A thread takes
# 32 elements of one tensor, or 16 of each of several, and 48 to 80 registers. So three to five programs of eight warps
# share a multiprocessor and have 64 KiB or more in flight. Some of them load while others compute.
_WARPS = 8
_BLOCK_ONE = 8192
_BLOCK_MANY = 4096


def can_run(device_type: str) -> str | None:
    """Why these kernels cannot run on tensors of this device, or None. Triton's interpreter runs them anywhere."""
    if not isinstance(triton_passes.normaliser, triton.JITFunction):
        return None
    if device_type != "cuda":
        return f"they run on a CUDA device, not on {device_type!r} (there, only with TRITON_INTERPRET=1 set, slowly)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


class TritonKernels:
    """RowKernels for GPUs. For argmax a NaN is the greatest logit; all other figures of its row are NaN."""

    def normaliser(self, logits: Logits) -> Tensor:
        partial_MS = _partials(logits.product, _BLOCK_ONE)
        self._launch(triton_passes.normaliser, logits, _BLOCK_ONE, partial_MS, *_pointers(logits))
        return torch.logsumexp(partial_MS, dim=-1)

    def argmax(self, logits: Logits) -> Tensor:
        peak_MS = _partials(logits.product, _BLOCK_ONE)
        index_MS = torch.empty_like(peak_MS, dtype=torch.int64)
        self._launch(triton_passes.argmax, logits, _BLOCK_ONE, peak_MS, index_MS, *_pointers(logits))
        return index_MS.gather(1, peak_MS.argmax(dim=1, keepdim=True))[:, 0]

    def distance(self, draft: Logits, lse_N: Tensor, target: TargetRows) -> Distance:
        return Distance(*self._compared(triton_passes.distance, len(Distance._fields), draft, lse_N, target))

    def divergence(self, draft: Logits, lse_N: Tensor, target: TargetRows) -> Divergence:
        return Divergence(*self._compared(triton_passes.divergence, len(Divergence._fields), draft, lse_N, target))

    def _compared(self, kernel: Any, figures: int, draft: Logits, lse_N: Tensor, target: TargetRows) -> Tensor:
        partial_FNS = _partials(draft.product, _BLOCK_MANY, figures)
        self._launch(
            kernel, draft, _BLOCK_MANY, partial_FNS, *_pointers(draft), lse_N.contiguous(), *_target_pointers(target)
        )
        return partial_FNS.sum(dim=-1)

    def gradient(
        self,
        draft: Logits,
        lse_N: Tensor,
        incoming: Incoming,
        *,
        label_N: Tensor | None = None,
        target: TargetRows | None = None,
        below_N: Tensor | None = None,
        base_lse_N: Tensor | None = None,
    ) -> None:
        # Autograd often gives one number expanded over the rows.
        per_row = (label_N, *incoming, below_N, base_lse_N)
        self._launch(
            triton_passes.gradient,
            draft,
            _BLOCK_MANY,
            *_pointers(draft),
            lse_N.contiguous(),
            *_target_pointers(target),
            *(None if one is None else one.contiguous() for one in per_row),
        )

    @staticmethod
    def _launch(kernel: Any, logits: Logits, block: int, *arguments: Any) -> None:
        num_rows, vocab_size = logits.product.shape
        # Triton launches on the current device, which may be another than the tensors'.
        with torch.cuda.device_of(logits.product):  # type: ignore[no-untyped-call]
            kernel[num_rows, triton.cdiv(vocab_size, block)](*arguments, vocab_size, BLOCK=block, num_warps=_WARPS)


def _pointers(logits: Logits) -> tuple[Any, ...]:
    """(product, its stride, correction, its stride, softcap), as kernels take them."""
    product, correction, softcap = logits
    assert product.stride(1) == 1
    assert correction is None or correction.stride(1) == 1
    return product, product.stride(0), correction, 0 if correction is None else correction.stride(0), softcap


def _target_pointers(target: TargetRows | None) -> tuple[Any, ...]:
    """(product, its stride, softcap, lse_U, whole_lse_U, row_N), as kernels take them."""
    if target is None:
        return None, 0, None, None, None, None
    product, correction, softcap = target.logits
    assert correction is None, "targets have no correction"
    assert product.stride(1) == 1
    whole_lse_U = None if target.whole_lse_U is None else target.whole_lse_U.contiguous()
    return product, product.stride(0), softcap, target.lse_U.contiguous(), whole_lse_U, target.row_N.contiguous()


def _partials(product_MV: Tensor, block: int, *planes: int) -> Tensor:
    """An empty tensor for the results of every block of every row, [*planes, M, S]."""
    num_rows, vocab_size = product_MV.shape
    dtype = torch.promote_types(product_MV.dtype, torch.float32)
    return product_MV.new_empty((*planes, num_rows, triton.cdiv(vocab_size, block)), dtype=dtype)
