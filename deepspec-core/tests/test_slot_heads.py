"""A head for each slot: every path of the row engine comes to what a plain loop over rows does."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from row_definition import WEIGHTINGS, K, assert_equal_to_the_definition, make, mixed

from deepspec_core.contracts.rows import Heads
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.footprint import footprint
from deepspec_core.rows.kernels.choice import choose_kernels
from deepspec_core.rows.kernels.formulas import why_not_compiled
from deepspec_core.rows.rows_check import RowsError
from deepspec_core.rows.weightings import Uniform


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("mix", ["ce", "soft_ce", "base", "all"])
@pytest.mark.parametrize(
    ("correction", "softcap", "train_head"), [(False, None, True), (True, None, True), (True, 2.0, False)]
)
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_equals_the_definition(
    mix: str, correction: bool, softcap: float | None, train_head: bool, chunk_rows: int | None, kernels: str
) -> None:
    rows, heads, leaves = make(correction=correction, softcap=softcap, train_head=train_head, by_slot=True)
    engine = RowEngine(mixed(mix), WEIGHTINGS["decay"], chunk_rows, kernels=kernels)
    assert_equal_to_the_definition(engine, rows, heads, leaves, mix, "decay")


@pytest.mark.parametrize("kernels", ["plain", "eager"])
def test_with_a_reduced_vocabulary_too(kernels: str) -> None:
    rows, heads, leaves = make(correction=True, train_head=True, by_slot=True, draft_ids=(0, 2, 3, 5, 6, 9))
    engine = RowEngine(mixed("all"), WEIGHTINGS["d-pace"], 7, kernels=kernels)
    assert_equal_to_the_definition(engine, rows, heads, leaves, "all", "d-pace")


@pytest.mark.parametrize("kernels", ["plain", "eager"])
def test_a_low_rank_part_a_slot_beside_one_head(kernels: str) -> None:
    """One frozen head for all slots, and a correction of its own for each."""
    rows, heads, leaves = make(correction=True, by_slot=True)
    shared = evolve(heads, draft=heads.target)
    engine = RowEngine(mixed("two"), Uniform(), 7, kernels=kernels)
    assert_equal_to_the_definition(engine, rows, shared, leaves, "two", "uniform")


def test_compiled_kernels_equal_the_definition() -> None:
    if reason := why_not_compiled():
        pytest.skip(reason)
    rows, heads, leaves = make(correction=True, softcap=2.0, train_head=True, by_slot=True)
    engine = RowEngine(mixed("all"), WEIGHTINGS["decay"], 7, kernels="compiled")
    assert_equal_to_the_definition(engine, rows, heads, leaves, "all", "decay")


@pytest.mark.parametrize("kernels", ["plain", "eager"])
def test_the_same_head_for_every_slot_is_one_head(kernels: str) -> None:
    rows, heads, leaves = make(train_head=True)
    several = evolve(heads, draft=heads.draft.expand(K, -1, -1))
    engine = RowEngine(mixed("mix"), WEIGHTINGS["decay"], 7, kernels=kernels)
    totals = [engine(rows, one).total for one in (several, heads)]
    torch.testing.assert_close(*totals)
    torch.testing.assert_close(*(torch.autograd.grad(total, list(leaves.values())) for total in totals))


@pytest.mark.parametrize("chunk_rows", [3, None])
def test_a_slot_without_rows_has_no_gradient(chunk_rows: int | None) -> None:
    rows, heads, leaves = make(train_head=True, by_slot=True)
    rows = evolve(rows, weight=torch.where(rows.slot == 1, 0.0, rows.weight))
    RowEngine(mixed("mix"), Uniform(), chunk_rows, kernels="eager")(rows, heads).total.backward()
    gradient = leaves["head"].grad
    assert gradient is not None
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert (gradient[[0, 2]] != 0).any(-1).all()


def test_no_rows() -> None:
    rows, heads, leaves = make(train_head=True, by_slot=True)
    rows = evolve(rows, weight=torch.zeros_like(rows.weight))
    result = RowEngine(mixed("mix"), Uniform())(rows, heads, with_metrics=True)
    result.total.backward()
    assert result.total == 0
    assert torch.equal(leaves["head"].grad, torch.zeros_like(heads.draft))


def test_a_slot_without_a_head_is_refused() -> None:
    rows, heads, _ = make(by_slot=True)
    with pytest.raises(RowsError) as caught:
        RowEngine(mixed("ce"), Uniform())(rows, evolve(heads, draft=heads.draft[:2]))
    assert caught.value.field == "slot"
    assert "below 2, the number of heads" in str(caught.value.expected)


def test_a_footprint_counts_every_head_s_gradient() -> None:
    rows, heads, _ = make(train_head=True)
    choice = choose_kernels("plain", device_type="cpu", vocab_size=heads.draft.shape[0])

    def of(some: Heads) -> int:
        sizes = {"chunk_rows": None, "compares": True, "uncorrected": False, "dtype": torch.float32}
        return footprint(choice, rows, some, **sizes).gradient_bytes

    several = evolve(heads, draft=heads.draft.detach().repeat(K, 1, 1).requires_grad_())
    assert of(several) - of(heads) == (K - 1) * heads.draft.numel() * 4
