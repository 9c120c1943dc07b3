"""A chunk of logits and the passes over it: in which implementations and on which devices they run here, and what they
should come to by softmax and autograd in float64."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.rows.kernels.formulas import (
    Distance,
    Divergence,
    Incoming,
    Logits,
    RowKernels,
    TargetRows,
    TorchKernels,
)

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux only")
NOT_INTERPRETING = pytest.mark.skipif(INTERPRETING, reason="Triton interprets in this process")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = (pytest.mark.gpu, NEEDS_GPU)

TRITON = pytest.param(("triton", "cuda"), id="triton-cuda", marks=ON_GPU)
if INTERPRETING:
    TRITON = pytest.param(("triton", "cpu"), id="interpreted")
VARIANTS = [
    pytest.param(("eager", "cpu"), id="eager"),
    pytest.param(("eager", "cuda"), id="eager-cuda", marks=ON_GPU),
    pytest.param(("compiled", "cuda"), id="compiled-cuda", marks=ON_GPU),
    TRITON,
]


def kernels_of(variant: tuple[str, str]) -> RowKernels:
    if variant[0] != "triton":
        return TorchKernels(compiled=variant[0] == "compiled")
    from deepspec_core.rows.kernels.triton_kernels import TritonKernels

    return TritonKernels()


@frozen(kw_only=True)
class Case:
    """What a chunk is made of. `scale`: of the logits; ce to base: which statistics are differentiated; `part`: whether
    the columns are part of the target's vocabulary."""

    rows: int = 5
    vocab: int = 1000
    dtype: torch.dtype = torch.float32
    correction: bool = False
    softcap: float | None = None
    ce: bool = True
    soft: bool = True
    tv: bool = True
    base: bool = False
    scale: float = 3.0
    part: bool = False


CASES = {
    "everything": Case(vocab=4099, dtype=torch.bfloat16, correction=True, softcap=8.5, base=True),
    "plain": Case(soft=False, tv=False),
    "target": Case(vocab=4099),
    "one-row": Case(rows=1, vocab=4099, dtype=torch.bfloat16),
    "correction": Case(vocab=4099, correction=True, base=True, soft=False, tv=False),
    "correction-and-target": Case(rows=1, correction=True, dtype=torch.bfloat16),
    "softcap": Case(softcap=4.0, dtype=torch.bfloat16),
    "softcap-and-correction": Case(softcap=4.0, correction=True, soft=False, tv=False),
    "several-blocks": Case(vocab=8195, dtype=torch.bfloat16, base=True, correction=True),
    "float64": Case(vocab=4099, dtype=torch.float64, correction=True, softcap=8.7, base=True),
    "float16": Case(dtype=torch.float16, correction=True, softcap=8.5),
    "disagreement": Case(scale=30.0),
    "soft-alone": Case(ce=False, tv=False, softcap=4.0),
    "part-of-the-vocabulary": Case(vocab=4099, part=True),
    "part-with-all": Case(vocab=4099, dtype=torch.bfloat16, correction=True, softcap=8.5, base=True, part=True),
    "part-soft-alone": Case(ce=False, tv=False, part=True),
    "part-tv-alone": Case(ce=False, soft=False, part=True),
    "tv-alone": Case(ce=False, soft=False, correction=True),
    "base-alone": Case(ce=False, soft=False, tv=False, base=True, correction=True),
}
# As drafts and targets lie in the engine's buffers, rows are further apart than they are long.
PAD = 16
FILL = 77.0
# What tokens beyond the columns add to the normaliser.
BEYOND = 0.4


class Chunk:
    """A case's tensors on a device: products in buffers whose ends must stay as they are."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(3)
        self.stat_dtype = torch.promote_types(case.dtype, torch.float32)
        self.buffers: list[Tensor] = []
        self.draft = Logits(
            self.products(case.rows), self.products(case.rows) if case.correction else None, case.softcap
        )
        self.target = Logits(self.products(3), None, case.softcap)
        self.target_row_N = torch.tensor([0, 2, 2, 1, 0], device=device)[: case.rows]
        self.label_N = torch.randint(case.vocab, (case.rows,), generator=self.generator).to(device)
        ce, soft, tv, base = torch.randn(4, case.rows, generator=self.generator, dtype=self.stat_dtype).to(device)
        # Autograd hands over one number for all rows as a tensor without strides.
        self.incoming = Incoming(
            ce=ce if case.ce else None,
            soft=soft[:1].expand(case.rows) if case.soft else None,
            tv=tv if case.tv else None,
            ce_without_correction=base if case.base else None,
        )

    def products(self, rows: int) -> Tensor:
        values = torch.randn(rows, self.case.vocab, generator=self.generator, dtype=torch.float64) * self.case.scale
        buffer = torch.full((rows, self.case.vocab + PAD), FILL, dtype=self.case.dtype, device=self.device)
        self.buffers.append(buffer)
        buffer[:, : self.case.vocab] = values.to(self.case.dtype)
        return buffer[:, : self.case.vocab]


@frozen(kw_only=True)
class Figures:
    lse_N: Tensor
    base_lse_N: Tensor
    argmax_N: Tensor
    distance: Distance
    divergence: Divergence
    product: Tensor
    correction: Tensor | None


def figures_of(kernels: RowKernels, chunk: Chunk) -> Figures:
    """Every pass, and the gradient of what arrives, with no more than that needs."""
    draft, incoming = chunk.draft, chunk.incoming
    lse_N, base_lse_N = kernels.normaliser(draft), kernels.normaliser(draft._replace(correction=None))
    lse_U = kernels.normaliser(chunk.target)
    target = TargetRows(chunk.target, lse_U, chunk.target_row_N, lse_U + BEYOND if chunk.case.part else None)
    argmax_N = kernels.argmax(draft)
    distance, divergence = (compare(draft, lse_N, target) for compare in (kernels.distance, kernels.divergence))
    kernels.gradient(
        draft,
        lse_N,
        incoming,
        label_N=None if incoming.ce is None and incoming.ce_without_correction is None else chunk.label_N,
        target=None if incoming.soft is None and incoming.tv is None else target,
        below_N=None if incoming.tv is None else distance.below,
        base_lse_N=None if incoming.ce_without_correction is None else base_lse_N,
    )
    return Figures(
        lse_N=lse_N,
        base_lse_N=base_lse_N,
        argmax_N=argmax_N,
        distance=distance,
        divergence=divergence,
        product=draft.product,
        correction=draft.correction,
    )


def definition(chunk: Chunk) -> Figures:
    """The same by softmax and autograd in float64, from the same products."""
    case = chunk.case

    def cap(product: Tensor) -> Tensor:
        return product if case.softcap is None else case.softcap * torch.tanh(product / case.softcap)

    product = chunk.draft.product.double().cpu().clone().requires_grad_()
    correction = torch.zeros_like(product)
    if chunk.draft.correction is not None:
        correction = chunk.draft.correction.double().cpu().clone()
    correction.requires_grad_()
    base, logits = cap(product), cap(product) + correction
    log_q = logits.log_softmax(-1)
    log_p = cap(chunk.target.product.double().cpu()).log_softmax(-1)[chunk.target_row_N.cpu()]
    q, p = log_q.exp(), log_p.exp()
    whole_p = p * math.exp(-BEYOND) if case.part else p
    tv, soft_ce = (q - whole_p).abs().sum(-1), -(p * log_q).sum(-1)
    distance = Distance(
        tv=tv,
        overlap=torch.minimum(q, whole_p).sum(-1),
        below=torch.where(q < whole_p, q, torch.where(q == whole_p, q / 2, 0.0)).sum(-1),
    )
    divergence = Divergence(soft_ce=soft_ce, kl=(p * (log_p - log_q)).sum(-1))

    def at_label(log_probabilities: Tensor) -> Tensor:
        return -log_probabilities.gather(1, chunk.label_N.cpu()[:, None])[:, 0]

    statistics = (at_label(log_q), soft_ce, tv, at_label(base.log_softmax(-1)))
    pairs = zip(chunk.incoming, statistics, strict=True)
    total = sum((one.double().cpu() * statistic).sum() for one, statistic in pairs if one is not None)
    of_product, of_correction = torch.autograd.grad(total, [product, correction], materialize_grads=True)
    return Figures(
        lse_N=logits.detach().logsumexp(-1),
        base_lse_N=base.detach().logsumexp(-1),
        argmax_N=logits.argmax(-1),
        distance=Distance(*(one.detach() for one in distance)),
        divergence=Divergence(*(one.detach() for one in divergence)),
        product=of_product,
        correction=of_correction if case.correction else None,
    )


def compared(figures: Figures) -> tuple[Tensor, ...]:
    return (*figures.distance, *figures.divergence)


def assert_close(found: Tensor, expected: Tensor, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(found.double().cpu(), expected, rtol=rtol, atol=atol)
