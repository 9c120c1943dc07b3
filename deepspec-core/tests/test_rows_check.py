"""Rows, terms and weightings that break their contracts are told by field, in the step that meets them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from attrs import evolve
from row_definition import TERMS, make, mixed
from torch import Tensor

from deepspec_core.contracts.draft import DraftBatch
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.errors import ConfigError, PluginError
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.statistics import Undeclared
from deepspec_core.rows.weightings import Uniform
from deepspec_core.testing.tiny_draft import TinyDraft, TinySource
from deepspec_core.training.loader import MicroBatches, Plan
from deepspec_core.training.step import TrainingStep

MISSHAPEN = {
    "hidden": lambda rows: rows.hidden[:, 1:],
    "correction": lambda rows: rows.correction[1:],
    "target_hidden": lambda rows: rows.target_hidden[0],
    "target_index": lambda rows: rows.target_index.float(),
    "target_ids": lambda rows: rows.target_ids[:, None],
    "weight": lambda rows: rows.weight > 0,
    "slot": lambda rows: rows.slot[1:],
    "block": lambda rows: rows.block.int(),
    "extras": lambda rows: {"confidence_logits": rows.weight[1:]},
    "denominator": lambda rows: rows.weight[:1],
}
OUT_OF_PLACE = {
    "weight": [-1.0, float("nan")],
    "target_index": [-1, 6],
    "target_ids": [-100, 11],
    "slot": [-1, 7],
    "block": [99],
    "denominator": [-1.0, float("inf")],
}


def _engine() -> RowEngine:
    return RowEngine(mixed("mix"), Uniform())


@pytest.mark.parametrize("field", list(MISSHAPEN))
def test_shapes_and_kinds_of_numbers(field: str) -> None:
    rows, heads, _ = make(correction=True)
    with pytest.raises(PluginError, match=f"`{field}") as caught:
        _engine()(evolve(rows, **{field: MISSHAPEN[field](rows)}), heads)
    assert caught.value.found
    assert caught.value.expected


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, some in OUT_OF_PLACE.items() for value in some])
def test_numbers_that_are_out_of_range_or_order(field: str, value: float) -> None:
    rows, heads, _ = make()
    changed = torch.tensor(1.0) if field == "denominator" else getattr(rows, field).clone()
    if field == "denominator":
        changed.fill_(value)
    else:
        changed[rows.weight.nonzero()[0, 0]] = value
    with pytest.raises(PluginError, match=f"`{field}`") as caught:
        _engine()(evolve(rows, **{field: changed}), heads)
    assert f"{value:g}" in str(caught.value.found)


def test_rows_of_weight_0_may_hold_anything() -> None:
    rows, heads, _ = make()
    weight, ids, index = rows.weight.clone(), rows.target_ids.clone(), rows.target_index.clone()
    weight[3:6], ids[3:6], index[3:6] = 0, -100, -1
    odd = _engine()(evolve(rows, weight=weight, target_ids=ids, target_index=index), heads)
    assert torch.equal(odd.total, _engine()(evolve(rows, weight=weight), heads).total)


def test_no_rows_are_no_mistake() -> None:
    rows, heads, _ = make()
    assert _engine()(evolve(rows, weight=torch.zeros_like(rows.weight)), heads).total == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"target_index": None}, "target_index"), ({"target_hidden": None}, "target_index")],
)
def test_a_target_takes_both(fields: dict[str, Any], says: str) -> None:
    rows, heads, _ = make()
    with pytest.raises(PluginError, match=f"`{says}`"):
        RowEngine(mixed("ce"), Uniform())(evolve(rows, **fields), heads)


def test_rows_without_any_label() -> None:
    rows, heads, _ = make()
    bare = evolve(rows, target_hidden=None, target_index=None, target_ids=None)
    with pytest.raises(PluginError, match="`target_ids`"):
        RowEngine(mixed("ce"), Uniform())(bare, heads)


def test_heads_of_two_vocabularies() -> None:
    rows, heads, _ = make()
    with pytest.raises(PluginError, match=re.escape("`heads().target`")):
        _engine()(rows, Heads(draft=heads.draft, target=heads.target[1:]))


class Shuffled(TinyDraft):
    def forward(self, batch: DraftBatch) -> Rows:
        rows = super().forward(batch)
        return evolve(rows, block=rows.block.flip(0))


def test_the_draft_that_made_them_is_named() -> None:
    source, draft = TinySource(2), Shuffled()
    batch = MicroBatches(source, draft.preparation, seed=0)[Plan(epoch=0, indices=(0, 1))]
    step = TrainingStep(draft, RowEngine(mixed("ce"), Uniform()))
    with pytest.raises(PluginError, match="`block`") as caught:
        step(batch.to_draft_batch(source, torch.device("cpu")))
    assert ", Shuffled (" in str(caught.value.where)


class Term:
    needs_target = False
    needs_extras = ()

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *given: Any) -> Any:
        return self.value(given[-1])


@pytest.mark.parametrize(
    "value",
    [lambda stats: stats.ce.mean(), lambda stats: stats.ce[:, None], lambda stats: 1.0, lambda stats: stats.target_ids],
)
def test_a_term_or_weighting_of_other_than_one_number_a_row(value: Any) -> None:
    rows, heads, _ = make()
    with pytest.raises(PluginError, match="loss term 'own' does not return one number per row"):
        RowEngine({"own": (Term(value), 1.0)}, Uniform(), 4)(rows, heads)
    with pytest.raises(PluginError, match="the weighting does not return one number per row"):
        RowEngine(mixed("ce"), Term(value), 4)(rows, heads)


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("read", ["tv", "kl", "soft_ce", "acceptance", "overlap", "target_argmax"])
def test_a_term_that_reads_the_target_unannounced(read: str, kernels: str) -> None:
    def of_the_target(stats: Any) -> Tensor:
        return getattr(stats, read).float()

    rows, heads, _ = make()
    with pytest.raises(Undeclared, match="needs_target = True"):
        RowEngine({"own": (Term(of_the_target), 1.0)}, Uniform(), kernels=kernels)(rows, heads)


@pytest.mark.parametrize("kernels", ["plain", "eager"])
def test_a_weighting_that_reads_the_target_beside_terms_that_do_not(kernels: str) -> None:
    weighting = Term(lambda stats: stats.acceptance)
    rows, heads, _ = make()
    terms = mixed("ce")
    with pytest.raises(Undeclared, match="needs_target = True"):
        RowEngine(terms, weighting, kernels=kernels)(rows, heads)
    weighting.needs_target = True
    found = RowEngine(terms, weighting, kernels=kernels)(rows, heads)
    both = RowEngine(mixed("ce") | {"tv": (TERMS["tv"], 0.5)}, weighting, kernels=kernels)(rows, heads)
    assert torch.allclose(found.metrics["loss/ce"][0], both.metrics["loss/ce"][0])
    assert not torch.allclose(found.total, RowEngine(terms, Uniform(), kernels=kernels)(rows, heads).total)
    with pytest.raises(ConfigError, match="the weighting compares with the target"):
        RowEngine(terms, weighting, kernels=kernels)(evolve(rows, target_hidden=None, target_index=None), heads)
