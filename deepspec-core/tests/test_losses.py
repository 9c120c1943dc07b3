"""Terms, statistics and weightings on logits small enough to check from the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepspec_core.config.schema import LossOptions, WeightingOptions
from deepspec_core.contracts.loss import LossTerm, RowStats, Weighting
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.engine import RowEngine, build_engine
from deepspec_core.rows.statistics import ChunkStats
from deepspec_core.rows.terms import KL, CrossEntropy, NegativeLogAcceptance, SoftCrossEntropy, TotalVariation
from deepspec_core.rows.weighting_options import DecayOptions, DPaceOptions
from deepspec_core.rows.weightings import Decay, DPace, Uniform
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
    overlap = torch.where(p < q, p, q).sum(-1)
    torch.testing.assert_close(chunk.overlap, overlap)
    torch.testing.assert_close(chunk.acceptance, overlap.detach())
    assert chunk.draft_argmax.tolist() == draft.argmax(-1).tolist()
    assert chunk.target_argmax.tolist() == target.argmax(-1).tolist()
    torch.testing.assert_close(chunk.target_logits, target)
    assert isinstance(chunk, RowStats)


def test_reading_under_no_grad_first_does_not_cut_the_graph() -> None:
    chunk, base, *_ = stats()
    with torch.no_grad():
        assert chunk.acceptance.grad_fn is None
        for name in ("ce", "tv", "overlap", "soft_ce", "kl", "ce_without_correction"):
            getattr(chunk, name)  # read, as a weighting would
    for value in (chunk.ce, chunk.tv, chunk.overlap, chunk.soft_ce, chunk.kl, chunk.ce_without_correction):
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
    torch.testing.assert_close(NegativeLogAcceptance()(chunk), -chunk.acceptance.log())
    assert NegativeLogAcceptance.needs_target


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


def compare(draft: Tensor, target: Tensor) -> ChunkStats:
    """Row by row, [N, V] each, in the dtype given."""
    return ChunkStats(
        base_logits_NV=draft,
        draft_logits_NV=draft,
        target_logits_UV=target,
        target_row_N=torch.arange(len(draft)),
        target_ids_N=target.argmax(-1),
        extras={},
        differentiable=True,
    )


def overlap_gradients(draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of the overlap, and of 1 - tv / 2, in the draft's logits."""
    draft = draft.clone().requires_grad_()
    chunk = compare(draft, target)
    (overlap,) = torch.autograd.grad(chunk.overlap.sum(), draft, retain_graph=True)
    (rate,) = torch.autograd.grad((1 - chunk.tv / 2).sum(), draft)
    return overlap, rate


def test_the_overlap_and_the_total_variation_have_one_gradient_ties_included() -> None:
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(N, V, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(*overlap_gradients(torch.randn_like(target), target))
    # The probabilities of four tokens are equal to the last bit, those of two are not.
    tied = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert (tied.softmax(-1) == other.softmax(-1)).sum() == 4
    gradient, rate = overlap_gradients(tied, other)
    assert gradient.any()
    torch.testing.assert_close(gradient, rate)


def test_the_acceptance_terms_gradient() -> None:
    # gradcheck computes the term twice for each logit, so they are few.
    generator = torch.Generator().manual_seed(6)
    draft = torch.randn(3, 9, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: NegativeLogAcceptance()(compare(logits, target)), (draft,))


@pytest.mark.parametrize("rate", [1e-3, 1e-12, 1e-30])
def test_an_acceptance_near_zero_is_exact_and_so_is_its_gradient(rate: float) -> None:
    """Draft and target are each sure of another token; they share `rate` of their mass."""
    apart = -math.log(rate / 2)
    draft = torch.tensor([[apart, 0.0, -math.log(10.0)]], dtype=torch.float64)
    target = torch.tensor([[0.0, apart, -math.log(7.0)]], dtype=torch.float64)

    def value_and_gradient(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        logits = draft.to(dtype, copy=True).requires_grad_()
        value = NegativeLogAcceptance()(compare(logits, target.to(dtype)))
        value.backward()
        assert logits.grad is not None
        return value.detach().double(), logits.grad.double()

    exact, gradient = value_and_gradient(torch.float64)
    p, q = target.softmax(-1), draft.softmax(-1)
    less = (q < p).double()
    torch.testing.assert_close(exact, -torch.minimum(p, q).sum(-1).log())
    share = torch.minimum(p, q).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, q * (less * q).sum(-1, keepdim=True) / share - less * q / share)
    torch.testing.assert_close(value_and_gradient(torch.float32), (exact, gradient), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 100.0])
@pytest.mark.parametrize("apart", [80.0, 87.0, 88.0, 100.0, 1e4])
def test_where_nothing_is_accepted_the_term_stays_finite(apart: float, factor: float) -> None:
    logits = torch.tensor([[apart, 0.0, 0.0]], requires_grad=True)
    value = NegativeLogAcceptance()(compare(logits, torch.tensor([[0.0, apart, 0.0]])))
    (factor * value).backward()
    assert logits.grad is not None
    assert 0 < value.item() <= -math.log(torch.finfo(torch.float32).tiny) + 1e-4
    assert logits.grad.isfinite().all()
    assert (logits.grad.abs() <= factor).all()
    assert logits.grad.any() == (apart < 88.5)


def d_pace(ce: Tensor, block: Tensor, alpha: float) -> Tensor:
    """The definition, row by row: w_j = sum_{m >= j} prod_{i <= m} ((1 - alpha) q_i + alpha), in float64."""
    smoothed = [(1 - alpha) * math.exp(-value) + alpha for value in ce.tolist()]
    rows = range(len(smoothed))
    weights = []
    for j in rows:
        mine = [i for i in rows if block[i] == block[j]]
        weights.append(sum(math.prod(smoothed[i] for i in mine if i <= m) for m in mine if m >= j))
    return torch.tensor(weights, dtype=torch.float64)


LENGTHS = (1, 4, 2, 7, 3)


def blocks(dtype: torch.dtype) -> tuple[ChunkStats, Tensor, Tensor]:
    """Statistics, slots and blocks (numbered with gaps) of blocks of LENGTHS rows."""
    generator = torch.Generator().manual_seed(7)
    draft = 3 * torch.randn(sum(LENGTHS), V, generator=generator, dtype=torch.float64).to(dtype)
    slot = torch.cat([torch.arange(length) for length in LENGTHS])
    block = torch.cat([torch.full((length,), 3 * index + 2) for index, length in enumerate(LENGTHS)])
    return compare(draft.requires_grad_(), draft.detach().roll(1, 0)), slot, block


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d_pace_weighs_by_the_drafts_own_confidence(alpha: float, dtype: torch.dtype) -> None:
    chunk, slot, block = blocks(dtype)
    weight = DPace(DPaceOptions(alpha=alpha))(slot, block, chunk)
    assert (weight.dtype, weight.requires_grad) == (dtype, False)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(weight.double(), d_pace(chunk.ce.double(), block, alpha), rtol=tolerance, atol=0.0)
    assert isinstance(DPace(DPaceOptions()), Weighting)


def test_d_pace_without_confidence_counts_the_rows_that_are_left() -> None:
    chunk, slot, block = blocks(torch.float32)
    left = [length - k for length in LENGTHS for k in range(length)]
    assert DPace(DPaceOptions(alpha=1.0))(slot, block, chunk).tolist() == left


def test_d_pace_does_not_see_the_other_blocks_of_a_chunk() -> None:
    chunk, slot, block = blocks(torch.float32)
    together = DPace(DPaceOptions())(slot, block, chunk)
    logits, target = chunk.draft_logits, chunk.target_logits
    cuts = [slice(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) for i in range(len(LENGTHS))]
    alone = [DPace(DPaceOptions())(slot[cut], block[cut], compare(logits[cut], target[cut])) for cut in cuts]
    # A block's rows begin at another address when they stand alone.
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-6, atol=0)
    nothing = DPace(DPaceOptions())(slot[:0], block[:0], compare(logits[:0], target[:0]))
    assert nothing.shape == (0,)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.1])
def test_d_pace_needs_an_alpha_that_leaves_weights(alpha: float) -> None:
    with pytest.raises(ValueError):
        DPaceOptions(alpha=alpha)


@pytest.mark.parametrize("chunk_rows", [1, 5, None])
def test_the_engine_with_d_pace_and_the_acceptance_term(chunk_rows: int | None) -> None:
    chunk, slot, block = blocks(torch.float64)
    hidden, eye = chunk.draft_logits.detach().requires_grad_(), torch.eye(V, dtype=torch.float64)
    rows = Rows(
        hidden=hidden,
        target_hidden=chunk.target_logits,
        target_index=torch.arange(len(slot)),
        weight=torch.ones(len(slot), dtype=torch.float64),
        slot=slot,
        block=block,
    )
    options = LossOptions(
        terms={"lk": 2.0}, weighting=WeightingOptions(type="d-pace", options=DPaceOptions()), chunk_rows=chunk_rows
    )
    engine = build_engine(options, core_registry())
    assert isinstance(engine, RowEngine)
    result = engine(rows, Heads(draft=eye, target=eye))
    weight = d_pace(chunk.ce.detach(), block, 0.5)
    p, q = chunk.target_logits.softmax(-1), hidden.softmax(-1)
    total = (weight * 2.0 * -torch.minimum(p, q).sum(-1).log()).sum()
    torch.testing.assert_close(result.total, total)
    torch.testing.assert_close(result.denominator, weight.sum())
    found, expected = (torch.autograd.grad(value, hidden)[0] for value in (result.total, total))
    torch.testing.assert_close(found, expected)


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
