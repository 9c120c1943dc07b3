"""The recorded vectors of the dflash drafter on the gemma4 family: training exactly, decoding token for token.

The drafter's own tests hold those of the qwen3 family.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from deepspec_core.blocks.published import load_draft, published_name, save_draft
from deepspec_core.contracts.draft import DraftBatch, PreparedSample, Sample
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetAdapter, TargetFeatures
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.features.targets import load_target, open_adapter
from deepspec_core.plugins import load_plugins
from deepspec_core.registry import Registry
from deepspec_dflash.model import DFlashModel

PARITY = Path(__file__).parent / "parity"
CASE, DECODE, TARGET = (PARITY / name for name in ("gemma4-dflash", "gemma4-decode-dflash", "gemma4-target"))
Recorded = dict[str, Tensor]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins().registry


@pytest.fixture(scope="module")
def adapter(registry: Registry) -> TargetAdapter:
    return open_adapter(TARGET, registry=registry)


@pytest.fixture
def model(registry: Registry, adapter: TargetAdapter) -> DFlashModel:
    draft = load_draft(CASE / "draft", registry=registry, adapter=adapter)
    assert isinstance(draft, DFlashModel)
    return draft


@pytest.fixture
def batch(model: DFlashModel) -> DraftBatch:
    inputs = load_file(CASE / "inputs.safetensors")
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


def close(found: Tensor | None, expected: Tensor, relative: float) -> None:
    assert found is not None
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def test_rows_match_the_recording(model: DFlashModel, batch: DraftBatch) -> None:
    expected = load_file(CASE / "expected.safetensors")
    rows, counted = model(batch), expected["eval_mask"]
    close(model.logits(rows.hidden), expected["draft_logits"][counted], 1e-4)
    assert torch.equal(rows.target_ids, expected["target_ids"][counted])
    heads = model.heads()
    assert heads.softcap == 30.0
    target_logits = heads.softcap * torch.tanh(F.linear(rows.target_hidden, heads.target) / heads.softcap)
    close(target_logits[rows.target_index], expected["aligned_target_logits"][counted], 1e-4)


@pytest.mark.parametrize("path", ["split", "dense"])
def test_loss_and_gradients_match_the_recording(
    model: DFlashModel, batch: DraftBatch, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspec_dflash.attention.choose", lambda queries, layout, num_tokens: path)
    rows = model(batch)
    weights = rows.weight * torch.exp(-rows.slot / 4.0)
    losses = F.cross_entropy(model.logits(rows.hidden), rows.target_ids, reduction="none")
    loss = (weights * losses).sum() / (weights.sum() + 1e-6)
    close(loss.reshape(1), load_file(CASE / "expected.safetensors")["loss"], 1e-4)
    loss.backward()
    names = model.describe().weight_names
    trained = {published_name(name, names): part for name, part in model.named_parameters() if part.requires_grad}
    recorded = load_file(CASE / "grads.safetensors")
    assert trained.keys() == recorded.keys()
    for name, gradient in recorded.items():
        close(trained[name].grad, gradient, 1e-3)


def test_a_draft_is_saved_as_it_was_published(model: DFlashModel, adapter: TargetAdapter, tmp_path: Path) -> None:
    save_draft(model, adapter, tmp_path / "draft")
    written, published = (load_file(where / "model.safetensors") for where in (tmp_path / "draft", CASE / "draft"))
    assert written.keys() == published.keys()
    assert all(torch.equal(written[name], published[name]) for name in published)
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    for key, value in json.loads((CASE / "draft" / "config.json").read_text()).items():
        if key not in ("transformers_version", "rope_parameters"):
            assert config[key] == value, key


@pytest.mark.parametrize("batch_size", [1, 3])
def test_decoding_matches_the_recording(registry: Registry, adapter: TargetAdapter, batch_size: int) -> None:
    recorded = json.loads((DECODE / "case.json").read_text())
    samples = recorded["by_confidence_threshold"]["0.0"]["samples"]
    completions = decode(
        load_target(adapter, TARGET, dtype=torch.float32, device="cpu"),
        load_draft(DECODE / "draft", registry=registry, adapter=adapter).proposer(),
        [Request(id=str(i), prompt_ids=tuple(s["prompt"]), seed=i) for i, s in enumerate(samples)],
        sampling=Sampling(temperature=0.0),
        stop_ids=recorded["stop_token_ids"],
        max_new_tokens=recorded["max_new_tokens"],
        batch_size=batch_size,
        max_length=64,
    )
    found = {completion.id: completion for completion in completions}
    assert len(found) == len(samples)
    for index, sample in enumerate(samples):
        completion = found[str(index)]
        assert [*completion.prompt_ids, *completion.output_ids] == sample["output_ids"]
        assert sample["output_ids"] == recorded["target_greedy"][index]
        assert [one.proposal_length for one in completion.rounds] == sample["proposal_lengths"]
        assert [one.accepted_draft_length for one in completion.rounds] == sample["accepted_draft_lengths"]
        assert [one.acceptance_length for one in completion.rounds] == sample["acceptance_lengths"]
