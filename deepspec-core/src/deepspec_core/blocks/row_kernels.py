"""The passes over a chunk's logits that the row engine's statistics and gradients need, as few functions of tensors.

Products come in as the matrix multiplication left them (uncapped, in its dtype); every pass caps, corrects and converts
on the fly, so that no other tensor of a chunk's size is needed. `TorchKernels` runs the formulas below, compiled into
one loop each or as they stand; row_kernels_triton.py has the same in Triton. Knows tensors only; not terms, rows or
heads.

With z = cap(product) + correction, q = softmax(z), t = cap(target product), p = softmax(t), label y, for one row:

    lse = log sum exp z        tv = sum |q - p|        overlap = sum min(p, q)
    soft_ce = -sum p log q     kl = sum p (log p - log q)
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

# Rows are taken in slabs of this many logits where each operation is a pass of its own: what caches hold.
SLAB = 1 << 20


class Logits(NamedTuple):
    """Logits as products: cap(product) + correction."""

    product: Tensor  # [M, V]
    correction: Tensor | None = None  # [M, V]
    softcap: float | None = None

    def rows(self, span: slice) -> Logits:
        """Some of the rows."""
        return Logits(self.product[span], None if self.correction is None else self.correction[span], self.softcap)


class Comparison(NamedTuple):
    """Statistics of draft against target, [N] each; defined at the top of the file."""

    tv: Tensor
    overlap: Tensor
    below: Tensor
    soft_ce: Tensor
    kl: Tensor


class Incoming(NamedTuple):
    """What arrives at a row's statistics from the loss, [N] each: d loss / d statistic."""

    ce: Tensor
    soft: Tensor  # of soft_ce and kl together
    tv: Tensor  # of tv, less half of overlap's
    ce_without_correction: Tensor | None = None


class RowKernels(Protocol):
    """The four passes. Statistics are fp32, or fp64 for fp64 products."""

    def normaliser(self, logits: Logits) -> Tensor:
        """log sum exp over V, [M]."""
        ...

    def argmax(self, logits: Logits) -> Tensor:
        """[M] int64, the first of equals."""
        ...

    def compare(
        self, draft: Logits, lse_N: Tensor, target: Logits, target_lse_U: Tensor, target_row_N: Tensor
    ) -> Comparison:
        """Row n of the draft against row target_row_N[n] of the target."""
        ...

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
        """Overwrite draft.product with d loss / d product, draft.correction with d loss / d correction.

        Target arguments are all there or all None; base_lse_N goes with incoming.ce_without_correction.
        """
        ...


class TorchKernels:
    """The passes in PyTorch. `compiled`: one loop each by torch.compile, for which CPU needs a C++ compiler."""

    def __init__(self, *, compiled: bool) -> None:
        self.compiled = compiled

    def normaliser(self, logits: Logits) -> Tensor:
        if self.compiled:
            result: Tensor = _compiled(_normaliser)(logits)
            return result
        return torch.cat([_normaliser(logits.rows(span)) for span in _slabs(logits.product)])

    def argmax(self, logits: Logits) -> Tensor:
        # Compiled it is slower than the library's own, and only asked for now and then.
        return torch.cat([_argmax(logits.rows(span)) for span in _slabs(logits.product)])

    def compare(
        self, draft: Logits, lse_N: Tensor, target: Logits, target_lse_U: Tensor, target_row_N: Tensor
    ) -> Comparison:
        if self.compiled:
            return Comparison(*_compiled(_compare)(draft, lse_N, target, target_lse_U, target_row_N))
        parts = [
            _compare(draft.rows(span), lse_N[span], target, target_lse_U, target_row_N[span])
            for span in _slabs(draft.product)
        ]
        return Comparison(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

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
        if self.compiled:
            arguments = (draft, lse_N, label_N, incoming, target, target_lse_U, target_row_N, below_N, base_lse_N)
            _compiled(_gradient)(*arguments)
            return
        for span in _slabs(draft.product):
            _gradient(
                draft.rows(span),
                lse_N[span],
                label_N[span],
                Incoming(*(None if one is None else one[span] for one in incoming)),  # type: ignore[arg-type]
                target,
                target_lse_U,
                None if target_row_N is None else target_row_N[span],
                None if below_N is None else below_N[span],
                None if base_lse_N is None else base_lse_N[span],
            )


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


@functools.cache
def why_not_compiled() -> str | None:
    """Why torch.compile cannot build for the CPU here, None where it can. Tried once, on one addition."""
    from torch._inductor import config

    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, tuple | list) else (config.cpp.cxx,)
    if not any(candidate and shutil.which(candidate) for candidate in (*candidates, "clang++", "c++")):
        return "there is no C++ compiler"
    try:
        torch.compile(torch.neg)(torch.zeros(8))
    # What fails is the compiler, its headers or its flags, and each says so in an exception of its own.
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
    """Capped and corrected, [M, V] in the statistics' dtype."""
    capped_MV = _capped(logits.product, logits.softcap)
    return capped_MV if logits.correction is None else capped_MV + logits.correction


def _normaliser(logits: Logits) -> Tensor:
    return torch.logsumexp(logit_values(logits), dim=-1)


def _argmax(logits: Logits) -> Tensor:
    return logit_values(logits).argmax(dim=-1)


def _compare(
    draft: Logits, lse_N: Tensor, target: Logits, target_lse_U: Tensor, target_row_N: Tensor
) -> tuple[Tensor, ...]:
    log_q_NV = logit_values(draft) - lse_N[:, None]
    log_p_NV = logit_values(target)[target_row_N] - target_lse_U[target_row_N][:, None]
    q_NV, p_NV = log_q_NV.exp(), log_p_NV.exp()
    difference_NV = q_NV - p_NV
    return (
        difference_NV.abs().sum(-1),
        torch.minimum(q_NV, p_NV).sum(-1),
        (q_NV * (0.5 - 0.5 * difference_NV.sign())).sum(-1),
        -(p_NV * log_q_NV).sum(-1),
        (p_NV * (log_p_NV - log_q_NV)).sum(-1),
    )


def _gradient(
    draft: Logits,
    lse_N: Tensor,
    label_N: Tensor,
    incoming: Incoming,
    target: Logits | None,
    target_lse_U: Tensor | None,
    target_row_N: Tensor | None,
    below_N: Tensor | None,
    base_lse_N: Tensor | None,
) -> None:
    product_NV, correction_NV, softcap = draft
    capped_NV = _capped(product_NV, softcap)
    logits_NV = capped_NV if correction_NV is None else capped_NV + correction_NV
    q_NV = (logits_NV - lse_N[:, None]).exp()
    is_label_NV = torch.arange(product_NV.shape[1], device=product_NV.device)[None] == label_N[:, None]
    gradient_NV = incoming.ce[:, None] * torch.where(is_label_NV, q_NV - 1.0, q_NV)
    if target is not None:
        assert target_lse_U is not None
        assert target_row_N is not None
        assert below_N is not None
        p_NV = (logit_values(target)[target_row_N] - target_lse_U[target_row_N][:, None]).exp()
        sign_NV = (q_NV - p_NV).sign()
        gradient_NV = gradient_NV + incoming.soft[:, None] * (q_NV - p_NV)
        gradient_NV = gradient_NV + incoming.tv[:, None] * q_NV * (sign_NV - 1.0 + 2.0 * below_N[:, None])
    if correction_NV is not None:
        correction_NV.copy_(gradient_NV)
    if base_lse_N is not None:
        assert incoming.ce_without_correction is not None
        base_NV = (capped_NV - base_lse_N[:, None]).exp()
        base_NV = torch.where(is_label_NV, base_NV - 1.0, base_NV)
        gradient_NV = gradient_NV + incoming.ce_without_correction[:, None] * base_NV
    if softcap is not None:
        gradient_NV = gradient_NV * (1.0 - (capped_NV / softcap) ** 2)
    product_NV.copy_(gradient_NV)
