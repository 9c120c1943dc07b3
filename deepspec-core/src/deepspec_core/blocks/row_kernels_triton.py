"""The passes of row_kernels.py as Triton kernels, for GPUs; the formulas stand at the top of that file.

Every pass is a grid of programs (row, block of the vocabulary). A program reads its block once, in parallel, keeps it
in registers and leaves: what a multiprocessor has in flight is the blocks of its resident programs, so there are no
loops to pipeline, and a few hundred rows fill a machine. Where a pass reduces over the vocabulary, programs write what
their block came to, and those few numbers a row are reduced afterwards, in a fixed order and without atomics: the same
input gives the same bits. Rows run fastest, so that programs of one target position find it in the L2 cache.

Row counts are the grid's alone, so a kernel is compiled once for a run's vocabulary, dtypes, cap and options. Knows
tensors and their layout; not terms, rows or heads.

Legend: N rows of a chunk, M rows of any logits, U distinct target positions, V vocabulary, S blocks of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepspec_core.blocks.row_kernels import Comparison, Incoming, Logits

# Chosen by what kernels compile to for compute capability 9.0, not by timing at start-up, which would let runs differ.
# A thread takes 32 elements of one tensor or 16 of each of several: 48 to 80 registers, so three to five programs of
# eight warps share a multiprocessor, with 64 KiB and more on their way, and some load while others compute.
_WARPS = 8
_BLOCK_ONE = 8192
_BLOCK_MANY = 4096
# One number a row, often a slice: compiling again for how a slice happens to be aligned would gain nothing.
_PER_ROW = (
    "lse_N", "label_N", "ce_N", "soft_N", "tv_N", "ce_without_correction_N", "below_N", "base_lse_N", "target_lse_U",
    "target_row_N",
)  # fmt: skip


def can_run(device_type: str) -> str | None:
    """Why these kernels cannot run on tensors of this device, or None. Triton's interpreter runs them anywhere."""
    if not isinstance(_normaliser, triton.JITFunction):
        return None
    if device_type != "cuda":
        return f"they run on a CUDA device, not on {device_type!r} (there, only with TRITON_INTERPRET=1 set, slowly)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


class TritonKernels:
    """RowKernels for GPUs. A logit of NaN counts as the greatest to argmax, and makes its row's other figures NaN."""

    def normaliser(self, logits: Logits) -> Tensor:
        partial_MS = _partials(logits.product, _BLOCK_ONE)
        self._launch(_normaliser, logits, _BLOCK_ONE, partial_MS, *_pointers(logits))
        return torch.logsumexp(partial_MS, dim=-1)

    def argmax(self, logits: Logits) -> Tensor:
        peak_MS = _partials(logits.product, _BLOCK_ONE)
        index_MS = torch.empty_like(peak_MS, dtype=torch.int64)
        self._launch(_argmax, logits, _BLOCK_ONE, peak_MS, index_MS, *_pointers(logits))
        return index_MS.gather(1, peak_MS.argmax(dim=1, keepdim=True))[:, 0]

    def compare(
        self, draft: Logits, lse_N: Tensor, target: Logits, target_lse_U: Tensor, target_row_N: Tensor
    ) -> Comparison:
        partial_5NS = _partials(draft.product, _BLOCK_MANY, len(Comparison._fields))
        self._launch(
            _compare,
            draft,
            _BLOCK_MANY,
            partial_5NS,
            *_pointers(draft),
            lse_N.contiguous(),
            *_pointers(target),
            target_lse_U.contiguous(),
            target_row_N.contiguous(),
        )
        return Comparison(*partial_5NS.sum(dim=-1))

    def gradient(
        self,
        draft: Logits,
        lse_N: Tensor,
        label_N: Tensor,
        incoming: Incoming,
        *,
        target: Logits | None = None,
        target_lse_U: Tensor | None = None,
        target_row_N: Tensor | None = None,
        below_N: Tensor | None = None,
        base_lse_N: Tensor | None = None,
    ) -> None:
        # What autograd hands over is often one number expanded over the rows.
        per_row = (*incoming, target_lse_U, target_row_N, below_N, base_lse_N)
        self._launch(
            _gradient,
            draft,
            _BLOCK_MANY,
            *_pointers(draft),
            lse_N.contiguous(),
            label_N.contiguous(),
            *_pointers(target),
            *(None if one is None else one.contiguous() for one in per_row),
        )

    @staticmethod
    def _launch(kernel: Any, logits: Logits, block: int, *arguments: Any) -> None:
        num_rows, vocab_size = logits.product.shape
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(logits.product):  # type: ignore[no-untyped-call]
            kernel[num_rows, triton.cdiv(vocab_size, block)](*arguments, vocab_size, BLOCK=block, num_warps=_WARPS)


def _pointers(logits: Logits | None) -> tuple[Any, ...]:
    """(product, its stride, correction, its stride, softcap), as kernels take them."""
    if logits is None:
        return None, 0, None, 0, None
    product, correction, softcap = logits
    assert product.stride(1) == 1
    assert correction is None or correction.stride(1) == 1
    return product, product.stride(0), correction, 0 if correction is None else correction.stride(0), softcap


def _partials(product_MV: Tensor, block: int, *planes: int) -> Tensor:
    """Room for what every block of every row comes to, [*planes, M, S]."""
    num_rows, vocab_size = product_MV.shape
    dtype = torch.promote_types(product_MV.dtype, torch.float32)
    return product_MV.new_empty((*planes, num_rows, triton.cdiv(vocab_size, block)), dtype=dtype)


@triton.jit
def _exp(x):
    # tl.exp scales its argument and result by the case to keep denormals, which is more work than all else.
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _columns(BLOCK: tl.constexpr):
    return tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _load(pointer, stride, row, column, vocab_size, DTYPE: tl.constexpr):
    # 64 bits: rows times vocabulary can pass 2^31.
    return tl.load(pointer + row.to(tl.int64) * stride + column, mask=column < vocab_size, other=0.0).to(DTYPE)


@triton.jit
def _store(value, pointer, stride, row, column, vocab_size):
    tl.store(pointer + row.to(tl.int64) * stride + column, value.to(pointer.dtype.element_ty), mask=column < vocab_size)


@triton.jit
def _capped(product, product_stride, row, column, vocab_size, SOFTCAP: tl.constexpr, DTYPE: tl.constexpr):
    logits = _load(product, product_stride, row, column, vocab_size, DTYPE)
    if SOFTCAP is not None:
        # tanh by the exponential: an error of cap * 1e-7, in place of a call that the interpreter does not have.
        logits = SOFTCAP * (2.0 / (1.0 + _exp(logits * (-2.0 / SOFTCAP))) - 1.0)
    return logits


@triton.jit
def _values(
    product,
    product_stride,
    correction,
    correction_stride,
    SOFTCAP: tl.constexpr,
    row,
    column,
    vocab_size,
    DTYPE: tl.constexpr,
):
    logits = _capped(product, product_stride, row, column, vocab_size, SOFTCAP, DTYPE)
    if correction is not None:
        logits += _load(correction, correction_stride, row, column, vocab_size, DTYPE)
    return logits


@triton.jit
def _normaliser(
    partial_MS,
    product,
    product_stride,
    correction,
    correction_stride,
    SOFTCAP: tl.constexpr,
    vocab_size,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = partial_MS.dtype.element_ty
    row, column = tl.program_id(0), _columns(BLOCK)
    logits = _values(product, product_stride, correction, correction_stride, SOFTCAP, row, column, vocab_size, DTYPE)
    logits = tl.where(column < vocab_size, logits, float("-inf"))
    peak = tl.max(logits, axis=0)
    # So that nothing but infinities comes to an infinity, as torch.logsumexp has it.
    peak = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    lse = peak + tl.log(tl.sum(_exp(logits - peak), axis=0))
    tl.store(partial_MS + row * tl.num_programs(1) + tl.program_id(1), lse)


@triton.jit
def _argmax(
    peak_MS,
    index_MS,
    product,
    product_stride,
    correction,
    correction_stride,
    SOFTCAP: tl.constexpr,
    vocab_size,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = peak_MS.dtype.element_ty
    row, column = tl.program_id(0), _columns(BLOCK)
    logits = _values(product, product_stride, correction, correction_stride, SOFTCAP, row, column, vocab_size, DTYPE)
    logits = tl.where(logits == logits, logits, float("inf"))
    # Columns past the end come last, so they are never the first of equals.
    logits = tl.where(column < vocab_size, logits, float("-inf"))
    peak = tl.max(logits, axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(peak_MS + place, peak)
    tl.store(index_MS + place, tl.min(tl.where(logits == peak, column, vocab_size), axis=0))


@triton.jit(do_not_specialize=_PER_ROW)
def _compare(
    partial_5NS,
    product,
    product_stride,
    correction,
    correction_stride,
    SOFTCAP: tl.constexpr,
    lse_N,
    target,
    target_stride,
    target_correction,
    target_correction_stride,
    TARGET_SOFTCAP: tl.constexpr,
    target_lse_U,
    target_row_N,
    vocab_size,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = partial_5NS.dtype.element_ty
    row, column = tl.program_id(0), _columns(BLOCK)
    target_row = tl.load(target_row_N + row)
    log_q = _values(product, product_stride, correction, correction_stride, SOFTCAP, row, column, vocab_size, DTYPE)
    log_p = _values(
        target,
        target_stride,
        target_correction,
        target_correction_stride,
        TARGET_SOFTCAP,
        target_row,
        column,
        vocab_size,
        DTYPE,
    )
    # Past the end: a logarithm that is finite and whose exponential is 0, so that every term there is 0.
    log_q = tl.where(column < vocab_size, log_q - tl.load(lse_N + row), -1e4)
    log_p = tl.where(column < vocab_size, log_p - tl.load(target_lse_U + target_row), -1e4)
    q, p = _exp(log_q), _exp(log_p)
    difference = q - p
    # NaN takes the last branch, and stays.
    below = tl.where(difference > 0.0, 0.0, tl.where(difference < 0.0, q, 0.5 * q + difference))
    plane = tl.num_programs(0) * tl.num_programs(1)
    place = partial_5NS + row * tl.num_programs(1) + tl.program_id(1)
    tl.store(place, tl.sum(tl.abs(difference), axis=0))
    tl.store(place + plane, tl.sum(tl.minimum(q, p, propagate_nan=tl.PropagateNan.ALL), axis=0))
    tl.store(place + 2 * plane, tl.sum(below, axis=0))
    tl.store(place + 3 * plane, -tl.sum(p * log_q, axis=0))
    tl.store(place + 4 * plane, tl.sum(p * (log_p - log_q), axis=0))


@triton.jit(do_not_specialize=_PER_ROW)
def _gradient(
    product,
    product_stride,
    correction,
    correction_stride,
    SOFTCAP: tl.constexpr,
    lse_N,
    label_N,
    target,
    target_stride,
    target_correction,
    target_correction_stride,
    TARGET_SOFTCAP: tl.constexpr,
    ce_N,
    soft_N,
    tv_N,
    ce_without_correction_N,
    target_lse_U,
    target_row_N,
    below_N,
    base_lse_N,
    vocab_size,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = lse_N.dtype.element_ty
    row, column = tl.program_id(0), _columns(BLOCK)
    capped = _capped(product, product_stride, row, column, vocab_size, SOFTCAP, DTYPE)
    logits = capped
    if correction is not None:
        logits += _load(correction, correction_stride, row, column, vocab_size, DTYPE)
    q = _exp(logits - tl.load(lse_N + row))
    is_label = column == tl.load(label_N + row)
    gradient = tl.load(ce_N + row) * tl.where(is_label, q - 1.0, q)
    if target is not None:
        target_row = tl.load(target_row_N + row)
        log_p = _values(
            target,
            target_stride,
            target_correction,
            target_correction_stride,
            TARGET_SOFTCAP,
            target_row,
            column,
            vocab_size,
            DTYPE,
        )
        p = _exp(log_p - tl.load(target_lse_U + target_row))
        gradient += tl.load(soft_N + row) * (q - p)
        sign = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
        gradient += tl.load(tv_N + row) * q * ((sign - 1.0) + 2.0 * tl.load(below_N + row))
    if correction is not None:
        _store(gradient, correction, correction_stride, row, column, vocab_size)
    if base_lse_N is not None:
        base = _exp(capped - tl.load(base_lse_N + row))
        gradient += tl.load(ce_without_correction_N + row) * tl.where(is_label, base - 1.0, base)
    if SOFTCAP is not None:
        ratio = capped * (1.0 / SOFTCAP)
        gradient *= 1.0 - ratio * ratio
    _store(gradient, product, product_stride, row, column, vocab_size)
