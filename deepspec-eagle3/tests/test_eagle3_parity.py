"""The recorded vectors of the published implementation: training exactly, decoding token for token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch import Tensor

from deepspec_core.blocks.published import load_draft, published_name
from deepspec_core.blocks.row_engine import RowResult, build_engine
from deepspec_core.config.schema import LossOptions
from deepspec_core.contracts.draft import DraftBatch, Sample
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetAdapter, TargetFeatures
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.registry import Registry
from deepspec_eagle3.model import Eagle3Model, Places

Recorded = dict[str, Tensor]
AdapterOf = Callable[[str], TargetAdapter]
LOSS = LossOptions(terms={"soft_ce": 1.0})


class Case:
    """One recorded training case, its draft loaded with a normaliser."""

    def __init__(self, folder: Path, registry: Registry, adapter: TargetAdapter) -> None:
        loaded = load_draft(folder / "draft", registry=registry, adapter=adapter)
        assert isinstance(loaded, Eagle3Model)
        self.model, self.registry = loaded, registry
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        self.gradients = load_file(folder / "grads.safetensors")
        self.record: dict[str, Any] = json.loads((folder / "case.json").read_text())
        self.normalise("padded_batch")

    def normalise(self, by: str) -> None:
        self.model.options = evolve(self.model.options, normaliser=by)
        self.model.preparation = evolve(self.model.preparation, normaliser=by)

    @property
    def lengths(self) -> list[int]:
        found: list[int] = self.inputs["attention_mask"].sum(1).tolist()
        return found

    def batch(self) -> DraftBatch:
        inputs = self.inputs
        samples = [
            Sample(
                id=str(index),
                input_ids=inputs["input_ids"][index, :length],
                loss_mask=inputs["loss_mask"][index, :length].bool(),
                original_length=length,
            )
            for index, length in enumerate(self.lengths)
        ]
        prepared = [self.model.preparation.prepare(sample, np.random.default_rng(0)) for sample in samples]
        return DraftBatch(
            input_ids=inputs["input_ids"],
            loss_mask=inputs["loss_mask"].bool(),
            attention_mask=inputs["attention_mask"].bool(),
            features=TargetFeatures(
                hidden=inputs["target_hidden_states"], last_hidden=inputs["target_last_hidden_states"]
            ),
            prepared=self.model.preparation.collate(prepared),
        )

    def result(self, chunk_rows: int | None = None) -> RowResult:
        engine = build_engine(evolve(LOSS, chunk_rows=chunk_rows), self.registry)
        return engine(self.model(self.batch()), self.model.heads(), with_metrics=True)


@pytest.fixture
def case(parity: Path, registry: Registry, adapter_of: AdapterOf, family: str) -> Case:
    return Case(parity / f"{family}-eagle3", registry, adapter_of(family))


def _close(found: Tensor, expected: Tensor, relative: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def test_logits_match_the_recording(case: Case) -> None:
    """At every index that is defined, supervised or not: later steps are made to run over all of them."""
    batch = case.batch()
    batch_size, num_tokens = batch.input_ids.shape
    everywhere = {
        "later_document": torch.arange(batch_size).repeat_interleave(num_tokens),
        "later_index": torch.arange(num_tokens).repeat(batch_size),
    }
    batch = evolve(batch, prepared=batch.prepared | everywhere)
    first, later = case.model.unroll(batch, Places.of(batch))
    states = [first, *(state.view(first.shape) for state in later)]
    assert len(states) == case.record["loss_config"]["ttt_length"] == 3
    index_T, lengths_B = torch.arange(num_tokens), torch.tensor(case.lengths)
    for step, state in enumerate(states):
        defined_BT = index_T < lengths_B[:, None] - step
        logits = case.model.logits(case.model.drafter.norm(state))
        _close(logits[defined_BT], case.expected[f"draft_logits.{step}"][defined_BT], 1e-4)


@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_loss_and_gradients_match_the_recording(case: Case, chunk_rows: int | None) -> None:
    result = case.result(chunk_rows)
    loss = result.total / result.denominator
    _close(loss.detach().reshape(1), case.expected["loss"], 1e-4)
    loss.backward()
    names = case.model.describe().weight_names
    trained = {published_name(name, names): part for name, part in case.model.named_parameters() if part.requires_grad}
    assert trained.keys() == case.gradients.keys()
    for name, gradient in case.gradients.items():
        found = trained[name].grad
        assert found is not None, name
        _close(found, gradient, 1e-3)


def test_metrics_match_the_recording(case: Case) -> None:
    result = case.result()
    metrics = {name: (above / below).item() for name, (above, below) in result.metrics.items()}
    recorded = dict(case.record["metrics"])
    for step in range(3):
        valid = recorded.pop(f"valid_tokens@{step}")
        assert result.metrics[f"accuracy@{step}"][1].item() == valid
        recorded.pop(f"ploss_{step}")
    assert {name: metrics[name] for name in recorded} == pytest.approx(recorded, rel=1e-4)


def test_each_steps_loss_matches_the_recording(case: Case) -> None:
    rows, heads = case.model(case.batch()), case.model.heads()
    engine = build_engine(LOSS, case.registry)
    for step in range(3):
        weight = torch.where(rows.slot == step, 1.0, 0.0)
        assert torch.equal(rows.weight > 0, torch.ones_like(rows.weight, dtype=torch.bool))
        result = engine(evolve(rows, weight=weight), heads)
        found = (result.total / result.denominator).item()
        assert found == pytest.approx(case.record["metrics"][f"ploss_{step}"], rel=1e-4)


def test_each_sequence_by_its_own_length(case: Case, family: str) -> None:
    """The same rows under the default normaliser: the recorded loss with other divisors."""
    rows, heads = case.model(case.batch()), case.model.heads()
    case.normalise("sequence")
    result = case.result()
    loss = (result.total / result.denominator).item()
    engine = build_engine(LOSS, case.registry)
    apart = 0.0
    document = case.batch().prepared["document"]
    for index, length in enumerate(case.lengths):
        part = engine(evolve(rows, weight=torch.where(document == index, rows.weight, 0.0)), heads)
        apart += part.total.item() / length / len(case.lengths)
    assert loss == pytest.approx(apart, rel=1e-5)
    if family == "qwen3":
        assert loss == pytest.approx(5.641, abs=5e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_decoding_matches_the_recording(
    parity: Path, registry: Registry, adapter_of: AdapterOf, family: str, batch_size: int
) -> None:
    recorded = json.loads((parity / f"{family}-decode-eagle3" / "case.json").read_text())
    samples = recorded["by_confidence_threshold"]["0.0"]["samples"]
    adapter = adapter_of(family)
    target = adapter.load(parity / f"{family}-target", dtype=torch.float32, device="cpu")
    model = load_draft(parity / f"{family}-decode-eagle3" / "draft", registry=registry, adapter=adapter)
    requests = [Request(id=str(i), prompt_ids=tuple(s["prompt"]), seed=i) for i, s in enumerate(samples)]
    found: dict[str, Completion] = {
        completion.id: completion
        for completion in decode(
            target,
            model.proposer(),
            requests,
            sampling=Sampling(temperature=0.0),
            stop_ids=recorded["stop_token_ids"],
            max_new_tokens=recorded["max_new_tokens"],
            batch_size=batch_size,
            max_length=64,
        )
    }
    assert len(found) == len(samples)
    for index, sample in enumerate(samples):
        completion = found[str(index)]
        assert [*completion.prompt_ids, *completion.output_ids] == sample["output_ids"]
        assert sample["output_ids"] == recorded["target_greedy"][index]
        assert [one.proposal_length for one in completion.rounds] == sample["proposal_lengths"]
        assert [one.accepted_draft_length for one in completion.rounds] == sample["accepted_draft_lengths"]
        assert [one.acceptance_length for one in completion.rounds] == sample["acceptance_lengths"]
