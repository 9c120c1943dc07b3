"""Rows of a draft that knows some of the target's tokens: every path of the row engine comes to the definition."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from row_definition import MIXES, TERMS, WEIGHTINGS, V, assert_equal_to_the_definition, make, mixed, naive
from torch import Tensor

from deepspec_core.contracts.loss import RowStats
from deepspec_core.contracts.rows import Rows
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.kernels.formulas import why_not_compiled
from deepspec_core.rows.rows_check import RowsError
from deepspec_core.rows.weightings import Uniform

IDS = (0, 2, 3, 5, 6, 9)


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("mix", [*TERMS, "all"])
@pytest.mark.parametrize(("correction", "softcap", "train_head"), [(False, None, True), (True, 2.0, False)])
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_equals_the_definition(
    mix: str, correction: bool, softcap: float | None, train_head: bool, chunk_rows: int | None, kernels: str
) -> None:
    rows, heads, leaves = make(correction=correction, softcap=softcap, train_head=train_head, draft_ids=IDS)
    weighting = "d-pace" if correction else "uniform"
    engine = RowEngine(mixed(mix), WEIGHTINGS[weighting], chunk_rows, kernels=kernels)
    assert_equal_to_the_definition(engine, rows, heads, leaves, mix, weighting)


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("mix", ["soft_ce", "two", "all"])
def test_the_target_s_argmax_is_the_label_where_there_is_none(mix: str, kernels: str) -> None:
    """Then a row is left out whose argmax over the whole vocabulary the draft does not know."""
    rows, heads, leaves = make(softcap=2.0, train_head=True, draft_ids=IDS)
    rows = evolve(rows, target_ids=None)
    engine = RowEngine(mixed(mix), WEIGHTINGS["decay"], 4, kernels=kernels)
    assert_equal_to_the_definition(engine, rows, heads, leaves, mix, "decay")


def test_compiled_kernels_equal_the_definition() -> None:
    if reason := why_not_compiled():
        pytest.skip(reason)
    rows, heads, leaves = make(correction=True, softcap=2.0, draft_ids=IDS)
    engine = RowEngine(mixed("all"), WEIGHTINGS["decay"], 7, kernels="compiled")
    assert_equal_to_the_definition(engine, rows, heads, leaves, "all", "decay")


@pytest.mark.parametrize("kernels", ["plain", "eager"])
def test_all_tokens_in_their_order_change_nothing(kernels: str) -> None:
    rows, heads, leaves = make(correction=True, softcap=2.0)
    everything = evolve(heads, draft_ids=torch.arange(V))
    engine = RowEngine(mixed("all"), WEIGHTINGS["d-pace"], 7, kernels=kernels)
    found, expected = (engine(rows, one, with_metrics=True) for one in (everything, heads))
    torch.testing.assert_close(found.total, expected.total)
    gradients = (torch.autograd.grad(one.total, list(leaves.values())) for one in (found, expected))
    torch.testing.assert_close(*gradients)
    share = found.metrics["outside_vocabulary"]
    assert (share[0].item(), share[1].item()) == (0.0, float((rows.weight > 0).sum()))
    kept = {name: ratio for name, ratio in found.metrics.items() if name != "outside_vocabulary"}
    torch.testing.assert_close(kept, dict(expected.metrics))


@pytest.mark.parametrize("kernels", ["plain", "eager"])
def test_metrics_count_the_rows_that_no_loss_counts(kernels: str) -> None:
    rows, heads, _ = make(draft_ids=IDS)
    rows = evolve(rows, weight=torch.ones_like(rows.weight))
    result = RowEngine(mixed("ce"), Uniform(), 7, kernels=kernels)(rows, heads, with_metrics=True)
    assert rows.target_ids is not None
    known = torch.isin(rows.target_ids, torch.tensor(IDS))
    assert 0 < known.sum() < len(known)
    assert result.denominator == known.sum()
    assert result.metrics["outside_vocabulary"][0] == (~known).sum()
    guesses = torch.tensor(IDS)[(rows.hidden @ heads.draft.T).argmax(-1)]
    correct = (guesses == rows.target_ids).float()
    assert rows.target_hidden is not None
    assert rows.target_index is not None
    p = (rows.target_hidden @ heads.target.T).softmax(-1)[rows.target_index]
    q = torch.zeros_like(p).index_copy(1, torch.tensor(IDS), (rows.hidden @ heads.draft.T).softmax(-1).detach())
    overlap = torch.minimum(p, q).sum(-1)
    for slot in range(3):
        at = rows.slot == slot
        total, count = result.metrics[f"accuracy@{slot}"]
        assert (total.item(), count.item()) == (correct[at].sum().item(), float(at.sum()))
        accepted, count = result.metrics[f"accept_rate@{slot}"]
        torch.testing.assert_close(accepted / count, overlap[at].mean())


class Shapes:
    """A term that reads logits sees those of the draft's tokens, of both."""

    needs_target = needs_logits = True
    needs_extras: tuple[str, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        assert stats.draft_logits.shape == stats.target_logits.shape
        assert set(stats.draft_argmax.tolist()) <= set(IDS)
        log_q, log_p = stats.draft_logits.log_softmax(-1), stats.target_logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_logits_are_those_of_the_draft_s_tokens() -> None:
    rows, heads, _ = make(draft_ids=IDS)
    found = RowEngine({"own": (Shapes(), 1.0)}, Uniform(), 7)(rows, heads)
    expected, _ = naive(rows, heads, {"kl": 1.0}, "uniform")
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "field", "expected"),
    [
        ([0, 2, 3, 5, 6], "heads().draft_ids", "[6], torch.int64"),
        ([0, 2, 3, 5, 6, V], "heads().draft_ids", f"token ids from 0 to below {V} that increase"),
        ([0, 2, 3, 3, 6, 9], "heads().draft_ids", f"token ids from 0 to below {V} that increase"),
        ([2, 0, 3, 5, 6, 9], "heads().draft_ids", f"token ids from 0 to below {V} that increase"),
    ],
)
def test_ids_that_are_none_are_refused(ids: list[int], field: str, expected: str) -> None:
    rows, heads, _ = make(draft_ids=IDS)
    with pytest.raises(RowsError) as caught:
        RowEngine(mixed("ce"), Uniform())(rows, evolve(heads, draft_ids=torch.tensor(ids)))
    assert (caught.value.field, caught.value.expected) == (field, expected)


def test_a_head_of_another_target_s_tokens_is_not_taken_from_before() -> None:
    """The rows of the target's head are kept from step to step, while the tokens are the same."""
    rows, heads, _ = make(draft_ids=IDS)
    engine = RowEngine(mixed("two"), Uniform())
    for ids in (IDS, (0, 1, 2, 3, 4, 5), IDS):
        changed = evolve(heads, draft_ids=torch.tensor(ids))
        expected, _ = naive(rows, changed, MIXES["two"], "uniform")
        torch.testing.assert_close(engine(rows, changed).total, expected, rtol=1e-6, atol=1e-6)
    assert heads.draft_ids is not None
    heads.draft_ids.copy_(torch.tensor([1, 2, 3, 5, 6, 10]))
    expected, _ = naive(rows, heads, MIXES["two"], "uniform")
    torch.testing.assert_close(engine(rows, heads).total, expected, rtol=1e-6, atol=1e-6)


def test_a_target_is_needed_for_a_reduced_vocabulary_only_where_a_term_compares() -> None:
    rows, heads, _ = make(draft_ids=IDS)
    bare = Rows(**{name: getattr(rows, name) for name in ("hidden", "target_ids", "weight", "slot", "block")})
    expected, _ = naive(rows, heads, {"ce": 1.0}, "uniform")
    found = RowEngine(mixed("ce"), Uniform())(bare, heads)
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=1e-6)
