"""Confidence in a token's survival: its loss term, its training metrics, and where it ends a proposal."""

from __future__ import annotations

import math

import pytest
import torch

from deepspec_core.contracts.loss import LossTerm
from deepspec_core.contracts.proposer import Proposal
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.decoding.confidence import cut
from deepspec_core.errors import ConfigError
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.terms import Confidence, CrossEntropy, TotalVariation
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.rows.weightings import Decay, Uniform
from deepspec_core.testing.core_registry import core_registry

SURVIVAL = torch.tensor([0.9, 0.6, 0.3, 0.5])


def _rows(logits: torch.Tensor) -> tuple[Rows, Heads]:
    """Two blocks of two slots, V = 2; the last row does not count. Draft logits (0, l) meet a target of (1/2, 1/2)."""
    rows = Rows(
        hidden=torch.tensor([[0.0], [2.0], [-1.0], [0.0]], requires_grad=True),
        target_hidden=torch.zeros(1, 1),
        target_index=torch.zeros(4, dtype=torch.int64),
        target_ids=torch.tensor([0, 1, 1, 0]),
        weight=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        slot=torch.tensor([0, 1, 0, 1]),
        block=torch.tensor([0, 0, 1, 1]),
        extras={"confidence_logits": logits},
    )
    head = torch.tensor([[0.0], [1.0]])
    return rows, Heads(draft=head, target=head)


def _acceptance(logit: float) -> float:
    return 1 - abs(1 / (1 + math.exp(-logit)) - 0.5)


@pytest.mark.parametrize("beside", [{}, {"tv": (TotalVariation(), 0.5)}])
def test_the_term_is_binary_cross_entropy_with_a_detached_acceptance(beside: dict[str, tuple[LossTerm, float]]) -> None:
    assert isinstance(core_registry().load("loss", "confidence")(), Confidence)
    logits = torch.logit(SURVIVAL).requires_grad_()
    rows, heads = _rows(logits)
    result = RowEngine({**beside, "confidence": (Confidence(), 2.0)}, Uniform())(rows, heads)
    accepted = [_acceptance(0.0), _acceptance(2.0), _acceptance(-1.0)]
    each = [-c * math.log(p) - (1 - c) * math.log(1 - p) for c, p in zip(accepted, SURVIVAL.tolist(), strict=False)]
    assert result.metrics["loss/confidence"][0].item() == pytest.approx(sum(each))
    result.total.backward()
    expected = [2 * (p - c) for c, p in zip(accepted, SURVIVAL.tolist(), strict=False)]
    torch.testing.assert_close(logits.grad, torch.tensor([*expected, 0.0]))
    assert rows.hidden.grad is not None
    assert bool(rows.hidden.grad.any()) is bool(beside), "the acceptance is a label"


@pytest.mark.parametrize("chunk_rows", [1, None])
def test_metrics_by_hand(chunk_rows: int | None) -> None:
    rows, heads = _rows(torch.logit(SURVIVAL))
    engine = RowEngine({"ce": (CrossEntropy(), 1.0)}, Decay(DecayOptions(gamma=2.0)), chunk_rows)
    metrics = engine(rows, heads, with_metrics=True).metrics
    p, c = SURVIVAL.tolist(), [_acceptance(0.0), _acceptance(2.0), _acceptance(-1.0)]
    w = math.exp(-0.5)
    expected = {
        "confidence_abs_error": abs(p[0] - c[0]) + w * abs(p[1] - c[1]) + abs(p[2] - c[2]),
        "confidence_bias": (p[0] - c[0]) + w * (p[1] - c[1]) + (p[2] - c[2]),
        "confidence_cumprod_bias": (p[0] - c[0]) + w * (p[0] * p[1] - c[0] * c[1]) + (p[2] - c[2]),
    }
    for name, above in expected.items():
        assert metrics[name][0].item() == pytest.approx(above), name
        assert metrics[name][1].item() == pytest.approx(2 + w)
    assert not any(name.startswith("confidence") for name in engine(rows, heads).metrics)


def _proposal(confidence: list[list[float]] | None) -> Proposal:
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    return Proposal(
        tokens=tokens,
        lengths=torch.tensor([3, 2]),
        probabilities=torch.rand(2, 3, 9),
        confidence=None if confidence is None else torch.logit(torch.tensor(confidence)),
    )


@pytest.mark.parametrize(
    ("threshold", "lengths"), [(0.2, [3, 2]), (0.5, [3, 1]), (0.65, [1, 1]), (0.85, [1, 0]), (0.95, [0, 0])]
)
def test_a_proposal_ends_before_its_first_doubtful_token(threshold: float, lengths: list[int]) -> None:
    proposal = _proposal([[0.9, 0.6, 0.9], [0.8, 0.3, 0.9]])
    found, width = cut(proposal, threshold), max(lengths)
    assert found.lengths.tolist() == lengths
    assert torch.equal(found.tokens, proposal.tokens[:, :width])
    assert found.probabilities is not None
    assert found.confidence is not None
    assert found.probabilities.shape == (2, width, 9)
    assert found.confidence.shape == (2, width)


def test_a_threshold_without_confidence_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)gives no confidence.*confidence_threshold"):
        cut(_proposal(None), 0.5)
