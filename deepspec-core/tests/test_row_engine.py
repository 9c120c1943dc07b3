"""The row engine against a plain float64 computation: every term, mix, weighting, chunk size, kernel and input."""

from __future__ import annotations

import itertools

import pytest
import torch
from attrs import evolve
from row_definition import (
    MIXES,
    TERMS,
    WEIGHTINGS,
    V,
    assert_equal_to_the_definition,
    make,
    mixed,
    naive,
)
from torch import Tensor

from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.coefficient_schedule import CoefficientSchedule
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.kernels.formulas import why_not_compiled
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.rows.weightings import Decay, Uniform


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("correction", "softcap", "train_head"), list(itertools.product((False, True), (None, 2.0), (False, True)))
)
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_equals_the_definition(
    mix: str, correction: bool, softcap: float | None, train_head: bool, chunk_rows: int | None, kernels: str
) -> None:
    rows, heads, leaves = make(correction=correction, softcap=softcap, train_head=train_head)
    weighting = "decay" if correction else "uniform"
    engine = RowEngine(mixed(mix), WEIGHTINGS[weighting], chunk_rows, kernels=kernels)
    assert_equal_to_the_definition(engine, rows, heads, leaves, mix, weighting)


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("mix", ["ce", "base"])
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_rows_without_a_target(mix: str, chunk_rows: int | None, kernels: str) -> None:
    rows, heads, leaves = make(correction=True, softcap=2.0)
    expected, _ = naive(rows, heads, MIXES[mix], "uniform")
    wanted = torch.autograd.grad(expected, leaves["hidden"])[0]
    bare = evolve(rows, target_hidden=None, target_index=None)
    result = RowEngine(mixed(mix), Uniform(), chunk_rows, kernels=kernels)(bare, heads, with_metrics=True)
    result.total.backward()
    torch.testing.assert_close(result.total, expected.detach(), rtol=1e-6, atol=1e-6)
    assert leaves["hidden"].grad is not None
    torch.testing.assert_close(leaves["hidden"].grad, wanted, rtol=1e-5, atol=1e-6)
    assert "tau_greedy" in result.metrics
    assert "tau_probabilistic" not in result.metrics


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_weightings_see_whole_blocks(weighting: str, chunk_rows: int | None, kernels: str) -> None:
    rows, heads, leaves = make(correction=True)
    engine = RowEngine(mixed("all"), WEIGHTINGS[weighting], chunk_rows, kernels=kernels)
    assert_equal_to_the_definition(engine, rows, heads, leaves, "all", weighting)


# Building such a set takes half a minute. test_reduced_vocabulary.py and test_row_weights.py build smaller ones.
@pytest.mark.slow
@pytest.mark.parametrize(("correction", "softcap"), [(False, None), (True, 2.0)])
def test_compiled_kernels_equal_the_definition(correction: bool, softcap: float | None) -> None:
    if reason := why_not_compiled():
        pytest.skip(reason)
    rows, heads, leaves = make(correction=correction, softcap=softcap)
    engine = RowEngine(mixed("all"), WEIGHTINGS["decay"], 7, kernels="compiled")
    assert_equal_to_the_definition(engine, rows, heads, leaves, "all", "decay")


@pytest.mark.parametrize("kernels", ["plain", "eager"])
def test_coefficients_follow_the_step(kernels: str) -> None:
    rows, heads, _ = make()
    schedule = CoefficientSchedule(start=0.0, end=1.0, steps=4)
    engine = RowEngine({"ce": (TERMS["ce"], schedule), "tv": (TERMS["tv"], 0.5)}, Uniform(), kernels=kernels)
    for step, coefficient in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        expected, _ = naive(rows, heads, {"ce": coefficient, "tv": 0.5}, "uniform")
        torch.testing.assert_close(engine(rows, heads, step=step).total, expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_fp32_and_bf16_products(chunk_rows: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        rows, heads, leaves = make(correction=True, dtype=dtype)
        expected, _ = naive(rows, heads, MIXES["mix"], "uniform")
        (gradient,) = torch.autograd.grad(expected, leaves["correction_head"])
        result = RowEngine(mixed("mix"), Uniform(), chunk_rows)(rows, heads)
        result.total.backward()
        assert result.total.dtype == torch.float32
        torch.testing.assert_close(result.total.double(), expected, rtol=tolerance, atol=tolerance)
        assert leaves["correction_head"].grad is not None
        assert leaves["correction_head"].grad.dtype == dtype
        torch.testing.assert_close(leaves["correction_head"].grad, gradient, rtol=4 * tolerance, atol=4 * tolerance)


def test_autocast_chooses_the_products_dtype_only() -> None:
    rows, heads, leaves = make(dtype=torch.float32)
    engine = RowEngine(mixed("ce"), Uniform())
    plain = engine(rows, heads).total
    for _ in range(2):  # the second time with the kept copy of the head
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = engine(rows, heads)
        result.total.backward()
        assert result.total.dtype == torch.float32
        assert result.total != plain
        torch.testing.assert_close(result.total, plain, rtol=2e-2, atol=2e-2)
        assert leaves["hidden"].grad is not None
        assert leaves["hidden"].grad.dtype == torch.float32
    assert not heads.draft.requires_grad
    with torch.no_grad():
        heads.draft.mul_(0.0)  # a kept copy must notice
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine(rows, heads).total.item() == pytest.approx(
            rows.weight.sum().item() * torch.tensor(V).log().item()
        )


@pytest.mark.parametrize("kernels", ["plain", "eager"])
def test_gradcheck(kernels: str) -> None:
    rows, heads, leaves = make(correction=True, softcap=3.0, train_head=True)
    # Two chunks, whose border cuts a block: the cost is the number of chunks, for each of hundreds of differences.
    engine = RowEngine(mixed("all"), Decay(DecayOptions()), 11, kernels=kernels)

    def total(hidden: Tensor, confidence: Tensor, head: Tensor, correction: Tensor, correction_head: Tensor) -> Tensor:
        moved = evolve(rows, hidden=hidden, correction=correction, extras={"confidence_logits": confidence})
        return engine(moved, Heads(draft=head, target=heads.target, correction=correction_head, softcap=3.0)).total

    # The confidence's label is detached, which finite differences do not see.
    engine.terms.pop("confidence")
    assert torch.autograd.gradcheck(total, list(leaves.values()))


def test_rows_without_labels_are_compared_with_the_targets_argmax() -> None:
    rows, heads, _ = make()
    assert rows.target_hidden is not None
    assert rows.target_index is not None
    argmax = (rows.target_hidden @ heads.target.mT).argmax(-1)[rows.target_index]
    fields = {name: getattr(rows, name) for name in Rows.__slots__ if name not in ("target_ids", "__weakref__")}
    engine = RowEngine(mixed("ce"), Uniform(), 4)
    found = engine(Rows(**fields), heads, with_metrics=True)
    expected = engine(Rows(**fields, target_ids=argmax), heads, with_metrics=True)
    assert found.metrics == expected.metrics
    assert found.total != engine(rows, heads).total


def test_no_gradient_work_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, heads, _ = make()
    engine = RowEngine(mixed("mix"), Uniform(), 4)
    expected = engine(rows, heads).total.item()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with torch.no_grad():
        result = engine(rows, heads)
    assert not result.total.requires_grad
    assert result.total.item() == pytest.approx(expected)
    frozen, heads, leaves = make()
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    assert not engine(frozen, heads).total.requires_grad


def test_the_rows_own_denominator_stands() -> None:
    rows, heads, _ = make()
    result = RowEngine(mixed("ce"), Uniform())(evolve(rows, denominator=torch.tensor(17.0)), heads)
    assert result.denominator.item() == 17.0
    assert result.metrics["loss"][1].item() == 17.0


def test_metrics_by_hand() -> None:
    """Two blocks of two slots, V = 2, where every figure can be counted on fingers."""
    # Draft logits (0, l): acceptance of a target (0.5, 0.5) is 1 - |sigmoid(l) - 0.5|.
    logit = torch.tensor([0.0, 2.0, -2.0, 0.0])
    head = torch.tensor([[0.0], [1.0]])
    rows = Rows(
        hidden=logit[:, None], target_hidden=torch.zeros(1, 1), target_index=torch.zeros(4, dtype=torch.int64),
        target_ids=torch.tensor([0, 1, 1, 0]), weight=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        slot=torch.tensor([0, 1, 0, 1]), block=torch.tensor([5, 5, 6, 6]),
    )  # fmt: skip
    engine = RowEngine(mixed("ce"), Uniform())
    result = engine(rows, Heads(draft=head, target=head), with_metrics=True)
    metrics = {name: (above.item(), below.item()) for name, (above, below) in result.metrics.items()}
    off = abs(torch.sigmoid(torch.tensor(2.0)).item() - 0.5)
    ce = [torch.tensor(2.0).log().item(), torch.log1p(torch.exp(torch.tensor(-2.0))).item()]
    expected = ce[0] + ce[1] + ce[1] + 2.0
    assert metrics == {
        "loss": pytest.approx((expected, 3.0)),
        "loss/ce": pytest.approx((expected, 3.0)),
        "accuracy@0": (1.0, 2.0),  # argmax of equal logits is 0, the label; of (0, -2) is 0, not the label
        "accuracy@1": (1.0, 1.0),
        "tau_greedy": (1 + 1 + 1 + 1, 2.0),
        "accept_rate@0": pytest.approx((1.0 + 1.0 - off, 2.0)),
        "accept_rate@1": pytest.approx((1.0 - off, 1.0)),
        "tau_probabilistic": pytest.approx((1 + 1 + (1 - off) + 1 + (1 - off), 2.0)),
    }
    assert set(engine(rows, Heads(draft=head, target=head)).metrics) == {"loss", "loss/ce"}
