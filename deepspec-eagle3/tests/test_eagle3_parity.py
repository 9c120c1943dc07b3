"""The recorded vectors of the published implementation: training exactly, decoding token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve

from deepspec_core.config.schema import LossOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import RowResult, build_engine
from deepspec_core.testing.draft_checks import check_near
from deepspec_core.testing.recorded import FORWARD, Recordings, TrainingCase
from deepspec_eagle3.model import Eagle3Model, Places

LOSS = LossOptions(terms={"soft_ce": 1.0})


def _normalise(case: TrainingCase, by: str) -> None:
    for part in ("options", "preparation"):
        setattr(case.draft, part, evolve(getattr(case.draft, part), normaliser=by))


def _result(case: TrainingCase, registry: Registry, **changes: Any) -> RowResult:
    engine = build_engine(evolve(LOSS, **changes), registry)
    return engine(case.draft(case.batch()), case.draft.heads(), with_metrics=True)


@pytest.fixture
def case(recordings: Recordings, family: str) -> TrainingCase:
    """With the published normaliser."""
    found = recordings.training(f"{family}-eagle3")
    assert isinstance(found.draft, Eagle3Model)
    _normalise(found, "padded_batch")
    return found


def test_logits_match_the_recording(case: TrainingCase) -> None:
    """At every index that is defined, supervised or not: later steps are made to run over all of them."""
    batch = case.batch()
    batch_size, num_tokens = batch.input_ids.shape
    everywhere = {
        "later_document": torch.arange(batch_size).repeat_interleave(num_tokens),
        "later_index": torch.arange(num_tokens).repeat(batch_size),
    }
    batch = evolve(batch, prepared=batch.prepared | everywhere)
    first, later = case.draft.unroll(batch, Places.of(batch))
    states = [first, *(state.view(first.shape) for state in later)]
    assert len(states) == case.record["loss_config"]["ttt_length"] == 3
    index_T, lengths_B = torch.arange(num_tokens), torch.tensor(case.lengths)
    for step, state in enumerate(states):
        defined_BT = index_T < lengths_B[:, None] - step
        logits = case.draft.logits(case.draft.drafter.norm(state))
        check_near(logits[defined_BT], case.expected[f"draft_logits.{step}"][defined_BT], FORWARD)


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_loss_and_gradients_match_the_recording(
    case: TrainingCase, registry: Registry, chunk_rows: int | None, kernels: str
) -> None:
    result = _result(case, registry, chunk_rows=chunk_rows, kernels=kernels)
    case.check_loss(result.total / result.denominator)


def test_metrics_match_the_recording(case: TrainingCase, registry: Registry) -> None:
    metrics = _result(case, registry).metrics
    valid = {f"valid_tokens@{step}": metrics[f"accuracy@{step}"][1].item() for step in range(3)}
    case.check_metrics(metrics, valid, leave_out=("ploss_",))


def test_each_steps_loss_matches_the_recording(case: TrainingCase, registry: Registry) -> None:
    rows, heads = case.draft(case.batch()), case.draft.heads()
    engine = build_engine(LOSS, registry)
    for step in range(3):
        weight = torch.where(rows.slot == step, 1.0, 0.0)
        assert torch.equal(rows.weight > 0, torch.ones_like(rows.weight, dtype=torch.bool))
        result = engine(evolve(rows, weight=weight), heads)
        found = (result.total / result.denominator).item()
        assert found == pytest.approx(case.record["metrics"][f"ploss_{step}"], rel=1e-4)


def test_each_sequence_by_its_own_length(case: TrainingCase, registry: Registry, family: str) -> None:
    """The same rows under the default normaliser: the recorded loss with other divisors."""
    rows, heads = case.draft(case.batch()), case.draft.heads()
    _normalise(case, "sequence")
    result = _result(case, registry)
    loss = (result.total / result.denominator).item()
    engine = build_engine(LOSS, registry)
    apart = 0.0
    document = case.batch().prepared["document"]
    for index, length in enumerate(case.lengths):
        part = engine(evolve(rows, weight=torch.where(document == index, rows.weight, 0.0)), heads)
        apart += part.total.item() / length / len(case.lengths)
    assert loss == pytest.approx(apart, rel=1e-5)
    if family == "qwen3":
        assert loss == pytest.approx(5.641, abs=5e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_decoding_matches_the_recording(recordings: Recordings, family: str, batch_size: int) -> None:
    recordings.decoding(f"{family}-decode-eagle3").check(batch_size=batch_size)
