"""Rows, heads and loss terms of a small case, and what the row engine should make of them, in float64 at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepspec_core.contracts.loss import LossTerm, RowStats, Weighting
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.coefficient_schedule import CoefficientSchedule
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.terms import (
    KL,
    Confidence,
    CrossEntropy,
    NegativeLogAcceptance,
    SoftCrossEntropy,
    TotalVariation,
)
from deepspec_core.rows.weighting_options import DecayOptions, DPaceOptions
from deepspec_core.rows.weightings import Decay, DPace, Uniform

BLOCKS, K, H, V, P, R = 7, 3, 5, 11, 6, 2
N = BLOCKS * K


class WithoutCorrection:
    """A term on a statistic no built-in term reads."""

    needs_target = False
    needs_logits = False
    needs_uncorrected = True
    needs_extras: tuple[str, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        return stats.ce_without_correction


class Blend:
    """A term that blends statistics per row, by an extra and by another statistic."""

    needs_target = True
    needs_logits = False
    needs_extras = ("confidence_logits",)

    def __call__(self, stats: RowStats) -> Tensor:
        share = stats.extras["confidence_logits"].sigmoid()
        return share * stats.kl + (1 - share) * stats.tv * stats.ce


TERMS: dict[str, LossTerm] = {
    "ce": CrossEntropy(),
    "soft_ce": SoftCrossEntropy(),
    "kl": KL(),
    "tv": TotalVariation(),
    "lk": NegativeLogAcceptance(),
    "confidence": Confidence(),
    "base": WithoutCorrection(),
    "blend": Blend(),
}
MIXES: dict[str, dict[str, float]] = {
    **{name: {name: 1.0} for name in TERMS},
    "two": {"ce": 0.1, "tv": 0.9},
    "mix": {"ce": 0.1, "tv": 0.9, "confidence": 1.0},
    "all": {name: 0.3 + 0.1 * number for number, name in enumerate(TERMS)},
}
WEIGHTINGS: dict[str, Weighting] = {
    "uniform": Uniform(),
    "decay": Decay(DecayOptions(gamma=4.0)),
    "d-pace": DPace(DPaceOptions(alpha=0.5)),
}


def mixed(mix: str) -> dict[str, tuple[LossTerm, float | CoefficientSchedule]]:
    return {name: (TERMS[name], coefficient) for name, coefficient in MIXES[mix].items()}


def make(
    *,
    correction: bool = False,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
    train_head: bool = False,
    draft_ids: Sequence[int] | None = None,
    by_slot: bool = False,
    seed: int = 1,
) -> tuple[Rows, Heads, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {"hidden": normal(N, H).requires_grad_(), "confidence": normal(N).requires_grad_()}
    columns = V if draft_ids is None else len(draft_ids)
    slots = (K,) if by_slot else ()
    head = normal(*slots, columns, H).requires_grad_(train_head)
    target = normal(V, H) if train_head or draft_ids is not None or by_slot else head
    if train_head:
        leaves["head"] = head
    if correction:
        leaves["correction"] = normal(N, R).requires_grad_()
        leaves["correction_head"] = normal(*slots, columns, R).requires_grad_()
    weight = torch.rand(N, generator=generator)
    weight[[2, 8, 9, 10, 11]] = 0.0
    rows = Rows(
        hidden=leaves["hidden"],
        correction=leaves.get("correction"),
        target_hidden=normal(P, H),
        target_index=torch.randint(0, P, (N,), generator=generator),
        target_ids=torch.randint(0, V, (N,), generator=generator),
        weight=weight,
        slot=torch.arange(N) % K,
        block=torch.arange(N) // K,
        extras={"confidence_logits": leaves["confidence"]},
    )
    heads = Heads(
        draft=head,
        target=target,
        correction=leaves.get("correction_head"),
        softcap=softcap,
        draft_ids=None if draft_ids is None else torch.tensor(draft_ids),
    )
    return rows, heads, leaves


def naive(rows: Rows, heads: Heads, mix: Mapping[str, float], weighting: str) -> tuple[Tensor, Tensor]:
    """Total and weights from all logits at once, written down from the definitions."""

    def cap(logits: Tensor) -> Tensor:
        return logits if heads.softcap is None else heads.softcap * torch.tanh(logits / heads.softcap)

    def project(row: Tensor, head: Tensor) -> Tensor:
        row, head = row.double(), head.double()
        return row @ head.T if head.dim() == 2 else torch.einsum("nh,nvh->nv", row, head[rows.slot])

    base = cap(project(rows.hidden, heads.draft))
    draft = base
    if rows.correction is not None:
        assert heads.correction is not None
        draft = base + project(rows.correction, heads.correction)
    assert rows.target_hidden is not None
    whole = cap(rows.target_hidden.double() @ heads.target.double().T)[rows.target_index].softmax(-1)
    labels = whole.argmax(-1) if rows.target_ids is None else rows.target_ids
    inside = torch.ones_like(labels, dtype=torch.bool)
    if heads.draft_ids is not None:
        whole = whole[:, heads.draft_ids]
        inside = (labels[:, None] == heads.draft_ids).any(-1)
        labels = (labels[:, None] == heads.draft_ids).int().argmax(-1)
    target = whole / whole.sum(-1, keepdim=True)
    q = draft.softmax(-1)
    tv = (q - whole).abs().sum(-1) + (1 - whole.sum(-1))
    acceptance = 1 - tv.detach() / 2
    confidence = rows.extras["confidence_logits"].double().sigmoid()
    at = labels[:, None]
    unknown = -math.log(torch.finfo(torch.promote_types(rows.hidden.dtype, torch.float32)).tiny)
    ce = torch.where(inside, -q.gather(1, at)[:, 0].log(), unknown)
    kl = (target * (target.log() - q.log())).sum(-1)
    values = {
        "ce": ce,
        "soft_ce": -(target * q.log()).sum(-1),
        "kl": kl,
        "tv": tv,
        "lk": -torch.minimum(q, whole).sum(-1).log(),
        "confidence": -(acceptance * confidence.log() + (1 - acceptance) * (1 - confidence).log()),
        "base": torch.where(inside, -base.softmax(-1).gather(1, at)[:, 0].log(), unknown),
        "blend": confidence * kl + (1 - confidence) * tv * ce,
    }
    weight = rows.weight.double()
    if weighting == "decay":
        weight = weight * torch.exp(-rows.slot.double() / 4.0)
    elif weighting == "d-pace":
        there = (weight != 0).reshape(BLOCKS, K)
        passes = (0.5 + 0.5 * torch.exp(-ce.detach())).reshape(BLOCKS, K)
        survival = torch.where(there, passes, 1.0).cumprod(1) * there
        weight = weight * survival.flip(1).cumsum(1).flip(1).flatten()
    weight = weight * inside
    total = torch.stack([weight * coefficient * values[name] for name, coefficient in mix.items()]).sum()
    return total, weight


def assert_equal_to_the_definition(
    engine: RowEngine, rows: Rows, heads: Heads, leaves: Mapping[str, Tensor], mix: str, weighting: str
) -> None:
    expected, weight = naive(rows, heads, MIXES[mix], weighting)
    wanted = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    result = engine(rows, heads)
    # Not 1: what comes in must be multiplied with.
    (result.total * 3.0).backward()
    torch.testing.assert_close(result.total, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.denominator.double(), weight.sum(), rtol=1e-6, atol=1e-6)
    for name, leaf, gradient in zip(leaves, leaves.values(), wanted, strict=True):
        assert leaf.grad is not None, name
        target = torch.zeros_like(leaf) if gradient is None else 3.0 * gradient
        torch.testing.assert_close(
            leaf.grad, target, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
