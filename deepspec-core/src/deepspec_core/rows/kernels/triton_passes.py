"""The Triton kernels themselves. triton_kernels.py chooses their grids and launches them.

The formulas stand at the top of formulas.py. A program computes one row and one block of the vocabulary. An argument
that is None at launch is left out of the compiled kernel. Knows pointers and strides. Does not know torch.

Legend: N rows of a chunk, M rows of any logits, U distinct target positions, V vocabulary, S blocks of it.
"""

import triton
import triton.language as tl

# One number a row, and often a slice. Compiling again for another alignment of the slice would gain nothing.
_PER_ROW = (
    "lse_N", "label_N", "ce_N", "soft_N", "tv_N", "ce_without_correction_N", "below_N", "base_lse_N", "target_lse_U",
    "target_whole_lse_U", "target_row_N",
)  # fmt: skip


@triton.jit
def _exp(x):
    # tl.exp scales its argument and result to keep denormals, which takes more work than all the rest.
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
def normaliser(
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
def argmax(
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


@triton.jit
def _target_log_p(
    target,
    target_stride,
    TARGET_SOFTCAP: tl.constexpr,
    target_lse_U,
    target_row_N,
    row,
    column,
    vocab_size,
    DTYPE: tl.constexpr,
):
    target_row = tl.load(target_row_N + row)
    logits = _capped(target, target_stride, target_row, column, vocab_size, TARGET_SOFTCAP, DTYPE)
    return logits - tl.load(target_lse_U + target_row)


@triton.jit
def _both(
    product,
    product_stride,
    correction,
    correction_stride,
    SOFTCAP: tl.constexpr,
    lse_N,
    target,
    target_stride,
    TARGET_SOFTCAP: tl.constexpr,
    target_lse_U,
    target_row_N,
    row,
    column,
    vocab_size,
    DTYPE: tl.constexpr,
):
    log_q = _values(product, product_stride, correction, correction_stride, SOFTCAP, row, column, vocab_size, DTYPE)
    log_p = _target_log_p(
        target,
        target_stride,
        TARGET_SOFTCAP,
        target_lse_U,
        target_row_N,
        row,
        column,
        vocab_size,
        DTYPE,
    )
    # Past the end: a logarithm that is finite and whose exponential is 0, so that every term there is 0.
    log_q = tl.where(column < vocab_size, log_q - tl.load(lse_N + row), -1e4)
    return log_q, tl.where(column < vocab_size, log_p, -1e4)


@triton.jit(do_not_specialize=_PER_ROW)
def distance(
    partial_3NS,
    product,
    product_stride,
    correction,
    correction_stride,
    SOFTCAP: tl.constexpr,
    lse_N,
    target,
    target_stride,
    TARGET_SOFTCAP: tl.constexpr,
    target_lse_U,
    target_whole_lse_U,
    target_row_N,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if target_whole_lse_U is not None:
        target_lse_U = target_whole_lse_U
    log_q, log_p = _both(
        product,
        product_stride,
        correction,
        correction_stride,
        SOFTCAP,
        lse_N,
        target,
        target_stride,
        TARGET_SOFTCAP,
        target_lse_U,
        target_row_N,
        row,
        _columns(BLOCK),
        vocab_size,
        partial_3NS.dtype.element_ty,
    )
    q, p = _exp(log_q), _exp(log_p)
    difference = q - p
    # NaN takes the last branch, and stays.
    below = tl.where(difference > 0.0, 0.0, tl.where(difference < 0.0, q, 0.5 * q + difference))
    plane = tl.num_programs(0) * tl.num_programs(1)
    place = partial_3NS + row * tl.num_programs(1) + tl.program_id(1)
    tl.store(place, tl.sum(tl.abs(difference), axis=0))
    tl.store(place + plane, tl.sum(tl.minimum(q, p, propagate_nan=tl.PropagateNan.ALL), axis=0))
    tl.store(place + 2 * plane, tl.sum(below, axis=0))


@triton.jit(do_not_specialize=_PER_ROW)
def divergence(
    partial_2NS,
    product,
    product_stride,
    correction,
    correction_stride,
    SOFTCAP: tl.constexpr,
    lse_N,
    target,
    target_stride,
    TARGET_SOFTCAP: tl.constexpr,
    target_lse_U,
    target_whole_lse_U,
    target_row_N,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    log_q, log_p = _both(
        product,
        product_stride,
        correction,
        correction_stride,
        SOFTCAP,
        lse_N,
        target,
        target_stride,
        TARGET_SOFTCAP,
        target_lse_U,
        target_row_N,
        row,
        _columns(BLOCK),
        vocab_size,
        partial_2NS.dtype.element_ty,
    )
    p = _exp(log_p)
    place = partial_2NS + row * tl.num_programs(1) + tl.program_id(1)
    tl.store(place, -tl.sum(p * log_q, axis=0))
    tl.store(place + tl.num_programs(0) * tl.num_programs(1), tl.sum(p * (log_p - log_q), axis=0))


@triton.jit(do_not_specialize=_PER_ROW)
def gradient(
    product,
    product_stride,
    correction,
    correction_stride,
    SOFTCAP: tl.constexpr,
    lse_N,
    target,
    target_stride,
    TARGET_SOFTCAP: tl.constexpr,
    target_lse_U,
    target_whole_lse_U,
    target_row_N,
    label_N,
    ce_N,
    soft_N,
    tv_N,
    ce_without_correction_N,
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
    gradient = tl.zeros_like(q)
    if label_N is not None:
        is_label = column == tl.load(label_N + row)
    if ce_N is not None:
        gradient += tl.load(ce_N + row) * tl.where(is_label, q - 1.0, q)
    if target is not None:
        log_p = _target_log_p(
            target,
            target_stride,
            TARGET_SOFTCAP,
            target_lse_U,
            target_row_N,
            row,
            column,
            vocab_size,
            DTYPE,
        )
        p = _exp(log_p)
        if soft_N is not None:
            gradient += tl.load(soft_N + row) * (q - p)
        if target_whole_lse_U is not None:
            target_row = tl.load(target_row_N + row)
            p = _exp(log_p + (tl.load(target_lse_U + target_row) - tl.load(target_whole_lse_U + target_row)))
        if tv_N is not None:
            sign = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
            gradient += tl.load(tv_N + row) * q * ((sign - 1.0) + 2.0 * tl.load(below_N + row))
    if correction is not None:
        _store(gradient, correction, correction_stride, row, column, vocab_size)
    if ce_without_correction_N is not None:
        base = _exp(capped - tl.load(base_lse_N + row))
        gradient += tl.load(ce_without_correction_N + row) * tl.where(is_label, base - 1.0, base)
    if SOFTCAP is not None:
        ratio = capped * (1.0 / SOFTCAP)
        gradient *= 1.0 - ratio * ratio
    _store(gradient, product, product_stride, row, column, vocab_size)
