"""Terms, statistics and weightings on logits small enough to check from the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepspec_core.blocks.losses import KL, CrossEntropy, SoftCrossEntropy, TotalVariation
from deepspec_core.blocks.row_engine import build_engine
from deepspec_core.blocks.row_stats import ChunkStats
from deepspec_core.blocks.weightings import Decay, Uniform
from deepspec_core.config.schema import LossOptions, WeightingOptions
from deepspec_core.config.weighting_options import DecayOptions
from deepspec_core.contracts.loss import LossTerm, RowStats, Weighting
from deepspec_core.testing.core_registry import core_registry

N, U, V = 5, 2, 7


def stats(*, differentiable: bool = True) -> tuple[ChunkStats, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(N, V, generator=generator).requires_grad_(differentiable)
    draft = base + torch.randn(N, V, generator=generator)
    target = torch.randn(U, V, generator=generator)
    rows = torch.tensor([0, 1, 1, 0, 1])
    chunk = ChunkStats(
        base_logits_NV=base,
        draft_logits_NV=draft,
        target_logits_UV=target,
        target_row_N=rows,
        target_ids_N=torch.tensor([0, 6, 3, 3, 1]),
        extras={},
        differentiable=differentiable,
    )
    return chunk, base, draft, target[rows]


def test_statistics_follow_their_definitions() -> None:
    chunk, base, draft, target = stats()
    p, q, q0 = target.softmax(-1), draft.softmax(-1), base.softmax(-1)
    each = torch.arange(N), chunk.target_ids
    torch.testing.assert_close(chunk.ce, -q[each].log())
    torch.testing.assert_close(chunk.ce_without_correction, -q0[each].log())
    torch.testing.assert_close(chunk.tv, (p - q).abs().sum(-1))
    torch.testing.assert_close(chunk.soft_ce, -(p * q.log()).sum(-1))
    torch.testing.assert_close(chunk.kl, (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(chunk.acceptance, torch.minimum(p, q).sum(-1).detach())
    assert chunk.draft_argmax.tolist() == draft.argmax(-1).tolist()
    assert chunk.target_argmax.tolist() == target.argmax(-1).tolist()
    torch.testing.assert_close(chunk.target_logits, target)
    assert isinstance(chunk, RowStats)


def test_reading_under_no_grad_first_does_not_cut_the_graph() -> None:
    chunk, base, *_ = stats()
    with torch.no_grad():
        assert chunk.acceptance.grad_fn is None
        for name in ("ce", "tv", "soft_ce", "kl", "ce_without_correction"):
            getattr(chunk, name)  # read, as a weighting would
    for value in (chunk.ce, chunk.tv, chunk.soft_ce, chunk.kl, chunk.ce_without_correction):
        assert torch.autograd.grad(value.sum(), base, retain_graph=True)[0].any()
    assert not chunk.acceptance.requires_grad


def test_terms() -> None:
    chunk, *_ = stats()
    assert CrossEntropy()(chunk) is chunk.ce
    assert TotalVariation()(chunk) is chunk.tv
    assert SoftCrossEntropy()(chunk) is chunk.soft_ce
    assert KL()(chunk) is chunk.kl
    assert isinstance(CrossEntropy(), LossTerm)
    assert (CrossEntropy.needs_target, TotalVariation.needs_target) == (False, True)
    assert SoftCrossEntropy.needs_target
    assert KL.needs_target


def test_soft_cross_entropy_and_kl_differ_by_the_targets_entropy() -> None:
    chunk, base, _, target = stats()
    entropy = torch.distributions.Categorical(logits=target).entropy()
    torch.testing.assert_close(chunk.soft_ce - chunk.kl, entropy)
    soft, kl = (torch.autograd.grad(value.sum(), base, retain_graph=True)[0] for value in (chunk.soft_ce, chunk.kl))
    torch.testing.assert_close(soft, kl)


def test_without_labels_the_targets_argmax_is_the_label() -> None:
    labelled, _, draft, target = stats()
    unlabelled = ChunkStats(
        base_logits_NV=draft,
        draft_logits_NV=draft,
        target_logits_UV=labelled.target_logits[:2],
        target_row_N=torch.tensor([0, 1, 1, 0, 1]),
        target_ids_N=None,
        extras={},
        differentiable=True,
    )
    assert torch.equal(unlabelled.target_ids, target.argmax(-1))
    each = torch.arange(N), target.argmax(-1)
    torch.testing.assert_close(unlabelled.ce, -draft.log_softmax(-1)[each])


def test_weightings() -> None:
    chunk, *_ = stats()
    slot, block = torch.tensor([0, 1, 2, 0, 4]), torch.tensor([0, 0, 0, 1, 1])
    assert Uniform()(slot, block, chunk).tolist() == [1.0] * 5
    weight = Decay(DecayOptions(gamma=2.0))(slot, block, chunk)
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.60653066, 0.36787944, 1.0, 0.13533528]))
    assert weight.dtype == torch.float32
    assert isinstance(Uniform(), Weighting)
    with pytest.raises(ValueError):
        DecayOptions(gamma=0.0)


def test_an_engine_from_a_run_files_section() -> None:
    engine = build_engine(
        LossOptions(
            terms={"ce": 0.1, "tv": 0.9},
            weighting=WeightingOptions(type="decay", options=DecayOptions(gamma=3.0)),
            chunk_rows=5,
        ),
        core_registry(),
    )
    assert {name: (type(term), coefficient) for name, (term, coefficient) in engine.terms.items()} == {
        "ce": (CrossEntropy, 0.1),
        "tv": (TotalVariation, 0.9),
    }
    assert isinstance(engine.weighting, Decay)
    assert (engine.weighting.gamma, engine.chunk_rows, engine.needs_target) == (3.0, 5, True)
    assert isinstance(build_engine(LossOptions(), core_registry()).weighting, Uniform)
