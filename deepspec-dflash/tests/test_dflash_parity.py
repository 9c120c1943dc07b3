"""The recorded vectors of the published implementation: training exactly, decoding token for token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from deepspec_core.blocks.published import load_draft, published_name
from deepspec_core.contracts.draft import DraftBatch, DraftModel, PreparedSample, Sample
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.rows import Rows
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.registry import Registry
from deepspec_dflash.model import DFlashModel
from deepspec_targets.qwen3 import Qwen3Adapter

Recorded = dict[str, Tensor]


def _batch(model: DraftModel, inputs: Recorded) -> DraftBatch:
    prepared: list[PreparedSample] = []
    for index, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        sample = Sample(
            id=str(index),
            input_ids=inputs["input_ids"][index, :length],
            loss_mask=inputs["loss_mask"][index, :length].bool(),
            original_length=length,
        )
        anchors = inputs["anchor_positions"][index][inputs["block_keep_mask"][index]]
        prepared.append(model.preparation.at(sample, anchors))
    return DraftBatch(
        input_ids=inputs["input_ids"],
        loss_mask=inputs["loss_mask"].bool(),
        attention_mask=inputs["attention_mask"].bool(),
        features=TargetFeatures(hidden=inputs["target_hidden_states"], last_hidden=inputs["target_last_hidden_states"]),
        prepared=model.preparation.collate(prepared),
    )


@pytest.fixture
def case(parity: Path, registry: Registry, adapter: Qwen3Adapter) -> tuple[DFlashModel, DraftBatch, Recorded]:
    model = load_draft(parity / "qwen3-dflash" / "draft", registry=registry, adapter=adapter)
    assert isinstance(model, DFlashModel)
    batch = _batch(model, load_file(parity / "qwen3-dflash" / "inputs.safetensors"))
    return model, batch, load_file(parity / "qwen3-dflash" / "expected.safetensors")


def _close(found: Tensor, expected: Tensor, relative: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def _loss(model: DFlashModel, rows: Rows) -> Tensor:
    weights = rows.weight * torch.exp(-rows.slot / 4.0)
    losses = F.cross_entropy(model.logits(rows.hidden), rows.target_ids, reduction="none")
    return (weights * losses).sum() / (weights.sum() + 1e-6)


def test_rows_match_the_recording(case: tuple[DFlashModel, DraftBatch, Recorded]) -> None:
    model, batch, expected = case
    rows = model(batch)
    counted = expected["eval_mask"]
    assert len(rows.hidden) == int(counted.sum())
    _close(model.logits(rows.hidden), expected["draft_logits"][counted], 1e-4)
    assert torch.equal(rows.target_ids, expected["target_ids"][counted])
    target_logits = F.linear(rows.target_hidden, model.heads().target)
    _close(target_logits[rows.target_index], expected["aligned_target_logits"][counted], 1e-4)
    assert len(rows.target_hidden) < len(rows.hidden), "each target position once"
    live = counted.any(-1).nonzero().tolist()
    slots = [(block, slot) for block, (b, a) in enumerate(live) for slot in range(int(counted[b, a].sum()))]
    assert list(zip(rows.block.tolist(), rows.slot.tolist(), strict=True)) == slots


@pytest.mark.parametrize("path", ["split", "dense"])
def test_loss_and_gradients_match_the_recording(
    case: tuple[DFlashModel, DraftBatch, Recorded], parity: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspec_dflash.attention.choose", lambda queries, layout, num_tokens: path)
    model, batch, expected = case
    loss = _loss(model, model(batch))
    _close(loss.reshape(1), expected["loss"], 1e-4)
    loss.backward()
    recorded = load_file(parity / "qwen3-dflash" / "grads.safetensors")
    names = model.describe().weight_names
    trained = {published_name(name, names): part for name, part in model.named_parameters() if part.requires_grad}
    assert trained.keys() == recorded.keys()
    for name, gradient in recorded.items():
        assert trained[name].grad is not None
        _close(trained[name].grad, gradient, 1e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_decoding_matches_the_recording(
    parity: Path, registry: Registry, adapter: Qwen3Adapter, batch_size: int
) -> None:
    recorded = json.loads((parity / "qwen3-decode-dflash" / "case.json").read_text())
    samples = recorded["by_confidence_threshold"]["0.0"]["samples"]
    target = adapter.load(parity / "qwen3-target", dtype=torch.float32, device="cpu")
    model = load_draft(parity / "qwen3-decode-dflash" / "draft", registry=registry, adapter=adapter)
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
