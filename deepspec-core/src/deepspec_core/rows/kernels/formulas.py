"""The passes over a chunk's logits from which the row engine gets statistics and gradients, as functions of tensors.

A pass takes products as the matrix multiplication left them: uncapped, in its dtype. It caps, corrects and converts
while it reads, so no other tensor of a chunk's size is needed. `TorchKernels` runs the formulas below, either compiled
into one loop each or one operation at a time. triton_kernels.py has the same passes in Triton. Knows tensors only, and
no terms, rows or heads.

With z = cap(product) + correction, q = softmax(z), t = cap(target product), p = softmax(t), label y, for one row:

    lse = log sum exp z        tv = sum |q - p|        overlap = sum min(p, q)
    soft_ce = -sum p log q     kl = sum p (log p - log q)
    (columns may be part of the target's vocabulary: then sum p < 1 in tv, overlap and below, and 1 in soft_ce and kl)
    below = sum q (1 - sign(q - p)) / 2      (the draft's mass where it is below the target; ties count half)

    d ce / dz = q - [y]        d soft_ce / dz = d kl / dz = q - p
    d tv / dz = q (sign(q - p) - 1 + 2 below)        d overlap / dz = -1/2 d tv / dz

Legend: N rows of a chunk, M rows of any logits, U distinct target positions, V vocabulary.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Where operations are not fused, rows are taken in slabs of this many logits, which fit the caches.
SLAB = 1 << 20
# How much of the vocabulary is searched for a number near a row's greatest logit.
_SEARCHED = 1 << 12


class Logits(NamedTuple):
    """Logits that are cap(product) + correction."""

    product: Tensor  # [M, V]
    correction: Tensor | None = None  # [M, V]
    softcap: float | None = None

    def rows(self, span: slice | Tensor) -> Logits:
        """Some of the rows."""
        return Logits(self.product[span], None if self.correction is None else self.correction[span], self.softcap)

    def columns(self, span: slice) -> Logits:
        """Some of the vocabulary."""
        correction = None if self.correction is None else self.correction[:, span]
        return Logits(self.product[:, span], correction, self.softcap)


class TargetRows(NamedTuple):
    """The target's logits that rows of a draft are compared with: row n with row row_N[n].

    whole_lse_U: The normaliser over the target's whole vocabulary, where the columns are part of it. It makes the p of
        tv and overlap; lse_U, that over the columns, makes the p of soft_ce and kl.
    """

    logits: Logits  # [U, V]
    lse_U: Tensor
    row_N: Tensor
    whole_lse_U: Tensor | None = None

    def rows(self, span: slice) -> TargetRows:
        """The target rows that some of the draft's rows are compared with."""
        return self._replace(row_N=self.row_N[span])


class Distance(NamedTuple):
    """How far apart draft and target are, [N] each; defined at the top of the file."""

    tv: Tensor
    overlap: Tensor
    below: Tensor


class Divergence(NamedTuple):
    """The draft's logarithms under the target, [N] each; defined at the top of the file."""

    soft_ce: Tensor
    kl: Tensor


class Incoming(NamedTuple):
    """The gradients of the loss by the statistics of each row, [N]. None counts as zero."""

    ce: Tensor | None = None
    soft: Tensor | None = None  # of soft_ce and kl together
    tv: Tensor | None = None  # of tv, less half of overlap's
    ce_without_correction: Tensor | None = None

    def rows(self, span: slice) -> Incoming:
        """The gradients of some of the rows."""
        return Incoming(*(None if one is None else one[span] for one in self))


class RowKernels(Protocol):
    """An implementation of the passes. Statistics are fp32, or fp64 for fp64 products."""

    def normaliser(self, logits: Logits) -> Tensor:
        """The log of the sum of exp over V, [M]."""
        ...

    def argmax(self, logits: Logits) -> Tensor:
        """The index of the greatest logit, [M] int64; the first of equals."""
        ...

    def distance(self, draft: Logits, lse_N: Tensor, target: TargetRows) -> Distance: ...

    def divergence(self, draft: Logits, lse_N: Tensor, target: TargetRows) -> Divergence: ...

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
        """Overwrite draft.product with d loss / d product, draft.correction with d loss / d correction.

        `incoming` decides which arguments are needed: label_N for either cross-entropy, base_lse_N for the one without
        correction, target for soft and tv, below_N for tv.
        """
        ...


class TorchKernels:
    """The passes in PyTorch. If `compiled`, torch.compile makes one loop of each; a CPU needs a C++ compiler for it."""

    def __init__(self, *, compiled: bool) -> None:
        self.compiled = compiled

    def normaliser(self, logits: Logits) -> Tensor:
        if self.compiled:
            return _compiled_normaliser(logits)
        return torch.cat([_normaliser(logits.rows(span)) for span in _slabs(logits.product)])

    def argmax(self, logits: Logits) -> Tensor:
        # Compiled, it is slower than the library's own; and it is rarely needed.
        return torch.cat([_argmax(logits.rows(span)) for span in _slabs(logits.product)])

    def distance(self, draft: Logits, lse_N: Tensor, target: TargetRows) -> Distance:
        return Distance(*self._compared(_distance, draft, lse_N, target))

    def divergence(self, draft: Logits, lse_N: Tensor, target: TargetRows) -> Divergence:
        return Divergence(*self._compared(_divergence, draft, lse_N, target))

    def _compared(
        self, function: Callable[..., tuple[Tensor, ...]], draft: Logits, lse_N: Tensor, target: TargetRows
    ) -> tuple[Tensor, ...]:
        if self.compiled:
            result: tuple[Tensor, ...] = _compiled(function)(draft, lse_N, target)
            return result
        parts = [function(draft.rows(span), lse_N[span], target.rows(span)) for span in _slabs(draft.product)]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

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
        if self.compiled:
            _compiled(_gradient)(draft, lse_N, incoming, label_N, target, below_N, base_lse_N)
            return
        for span in _slabs(draft.product):
            _gradient(
                draft.rows(span),
                lse_N[span],
                incoming.rows(span),
                None if label_N is None else label_N[span],
                None if target is None else target.rows(span),
                None if below_N is None else below_N[span],
                None if base_lse_N is None else base_lse_N[span],
            )


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    options = _vector_width() if why_not_compiled() is None else {}
    return torch.compile(function, dynamic=True, options=options)


def _vector_width() -> dict[str, Any]:
    """Options for torch.compile that name this processor's vector width.

    torch.compile keeps generated code on disk under a key that leaves the processor out. But loops are generated for
    one vector width. If a process with AVX-512 finds code made for AVX2, sums are wrong, or the process aborts. This
    happens to machines that share a cache directory. Options are part of the key, so they tell the machines apart.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return {"cpp.simdlen": pick_vec_isa().bit_width()}


@functools.cache
def why_not_compiled() -> str | None:
    """Why torch.compile cannot build for the CPU here, or None if it can. Tried once, with one addition."""
    from torch._inductor import config

    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, tuple | list) else (config.cpp.cxx,)
    if not any(candidate and shutil.which(candidate) for candidate in (*candidates, "clang++", "c++")):
        return "there is no C++ compiler"
    try:
        torch.compile(torch.neg, options=_vector_width())(torch.zeros(8))
    # The compiler, its headers or its flags may fail, each with another exception.
    except Exception as error:
        return f"the C++ compiler does not work for torch.compile ({str(error).strip().splitlines()[0]})"
    return None


def _slabs(product_MV: Tensor) -> Iterator[slice]:
    size = max(1, SLAB // product_MV.shape[1])
    return (slice(start, start + size) for start in range(0, len(product_MV), size))


def _capped(product_MV: Tensor, softcap: float | None) -> Tensor:
    logits_MV = product_MV.to(torch.promote_types(product_MV.dtype, torch.float32))
    return logits_MV if softcap is None else softcap * torch.tanh(logits_MV / softcap)


def logit_values(logits: Logits) -> Tensor:
    """The capped and corrected logits, [M, V], in the dtype of statistics."""
    capped_MV = _capped(logits.product, logits.softcap)
    return capped_MV if logits.correction is None else capped_MV + logits.correction


def _normaliser(logits: Logits) -> Tensor:
    return torch.logsumexp(logit_values(logits), dim=-1)


def _compiled_normaliser(logits: Logits) -> Tensor:
    lse_M: Tensor
    if logits.product.device.type == "cpu":
        # Any number near a row's greatest logit keeps the sum in range, so only part of the vocabulary is searched for
        # one. If the number found is not near enough, the sum shows it.
        near_M = logit_values(logits.columns(slice(_SEARCHED))).amax(dim=-1)
        lse_M = near_M + _compiled(_sum_exp)(logits, near_M).log()
        if bool(lse_M.isfinite().all()):
            return lse_M
    lse_M = _compiled(_normaliser)(logits)
    return lse_M


def _sum_exp(logits: Logits, shift_M: Tensor) -> Tensor:
    return (logit_values(logits) - shift_M[:, None]).exp().sum(dim=-1)


def _argmax(logits: Logits) -> Tensor:
    return logit_values(logits).argmax(dim=-1)


def _target_values(target: TargetRows, *, whole: bool) -> Tensor:
    """log p for each row of the draft, [N, V]; of the whole distribution, or of its columns' alone."""
    lse_U = target.whole_lse_U if whole and target.whole_lse_U is not None else target.lse_U
    return logit_values(target.logits.rows(target.row_N)) - lse_U[target.row_N][:, None]


def _distance(draft: Logits, lse_N: Tensor, target: TargetRows) -> tuple[Tensor, ...]:
    q_NV, p_NV = (logit_values(draft) - lse_N[:, None]).exp(), _target_values(target, whole=True).exp()
    difference_NV = q_NV - p_NV
    return (
        difference_NV.abs().sum(-1),
        torch.minimum(q_NV, p_NV).sum(-1),
        (q_NV * (0.5 - 0.5 * difference_NV.sign())).sum(-1),
    )


def _divergence(draft: Logits, lse_N: Tensor, target: TargetRows) -> tuple[Tensor, ...]:
    log_q_NV, log_p_NV = logit_values(draft) - lse_N[:, None], _target_values(target, whole=False)
    p_NV = log_p_NV.exp()
    return -(p_NV * log_q_NV).sum(-1), (p_NV * (log_p_NV - log_q_NV)).sum(-1)


def _gradient(
    draft: Logits,
    lse_N: Tensor,
    incoming: Incoming,
    label_N: Tensor | None,
    target: TargetRows | None,
    below_N: Tensor | None,
    base_lse_N: Tensor | None,
) -> None:
    product_NV, correction_NV, softcap = draft
    capped_NV = _capped(product_NV, softcap)
    logits_NV = capped_NV if correction_NV is None else capped_NV + correction_NV
    q_NV = (logits_NV - lse_N[:, None]).exp()
    gradient_NV = torch.zeros_like(q_NV)
    if incoming.ce is not None:
        gradient_NV = gradient_NV + incoming.ce[:, None] * _less_one_at(label_N, q_NV)
    if target is not None:
        if incoming.soft is not None:
            gradient_NV = gradient_NV + incoming.soft[:, None] * (q_NV - _target_values(target, whole=False).exp())
        if incoming.tv is not None:
            assert below_N is not None
            sign_NV = (q_NV - _target_values(target, whole=True).exp()).sign()
            gradient_NV = gradient_NV + incoming.tv[:, None] * q_NV * (sign_NV - 1.0 + 2.0 * below_N[:, None])
    if correction_NV is not None:
        correction_NV.copy_(gradient_NV)
    if incoming.ce_without_correction is not None:
        assert base_lse_N is not None
        base_NV = (capped_NV - base_lse_N[:, None]).exp()
        gradient_NV = gradient_NV + incoming.ce_without_correction[:, None] * _less_one_at(label_N, base_NV)
    if softcap is not None:
        gradient_NV = gradient_NV * (1.0 - (capped_NV / softcap) ** 2)
    product_NV.copy_(gradient_NV)


def _less_one_at(label_N: Tensor | None, q_NV: Tensor) -> Tensor:
    assert label_N is not None
    # In 32 bits. In 64, a vector holds half as many numbers, and the pass takes half as long again.
    column_V = torch.arange(q_NV.shape[1], dtype=torch.int32, device=q_NV.device)
    return torch.where(column_V == label_N.to(torch.int32)[:, None], q_NV - 1.0, q_NV)
