"""`anchor_predicts = false`: the anchor's slot predicts nothing, K slots make K - 1 predictions of the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepspec_core.blocks.published import load_draft, read_draft_config, save_draft
from deepspec_core.contracts.draft import DraftBatch, Sample
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.registry import Registry
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import DFlashOptions
from deepspec_targets.qwen3 import Qwen3Adapter

MakeModel, MakeSample, MakeBatch = Callable[..., DFlashModel], Callable[..., Sample], Callable[..., DraftBatch]


def test_rows_come_from_the_slots_after_the_anchor(
    make_model: MakeModel, make_sample: MakeSample, make_batch: MakeBatch
) -> None:
    sample, anchors = make_sample("a", 20), torch.tensor([3, 9, 17])
    every = make_model(block_size=4)
    others = make_model(block_size=4, anchor_predicts=False)
    outputs = every.block_hidden(make_batch(every, [every.preparation.at(sample, anchors)]))
    prepared = others.preparation.at(sample, anchors)
    rows = others(make_batch(others, [prepared]))
    # Label k is x[a+1+k] in both layouts; slot k + 1, which stands at its position, predicts it here.
    assert prepared.tensors["labels"][0].tolist() == sample.input_ids[4:7].tolist()
    assert list(zip(rows.block.tolist(), rows.slot.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1),
    ]  # fmt: skip
    torch.testing.assert_close(rows.hidden, outputs[rows.block, rows.slot + 1], rtol=0, atol=1e-6)
    assert rows.target_hidden is not None
    assert sample.features is not None
    positions = anchors[rows.block] + rows.slot
    assert torch.equal(rows.target_hidden[rows.target_index], sample.features.last_hidden[positions])
    assert torch.equal(rows.target_ids, sample.input_ids[positions + 1])


def test_decoding_sees_what_training_sees(
    make_model: MakeModel, make_sample: MakeSample, make_batch: MakeBatch
) -> None:
    model, sample = make_model(block_size=4, anchor_predicts=False), make_sample("a", 20)
    proposer = model.proposer()
    assert proposer.max_tokens == model.describe().max_tokens == 3
    proposer.open_slots(1, 32)
    assert sample.features is not None
    proposer.start(
        torch.tensor([0]),
        sample.input_ids[None],
        torch.tensor([9]),
        sample.input_ids[9:10],
        sample.features.hidden[None],
    )
    uniforms = torch.rand(1, 3, dtype=torch.float64)
    proposal = proposer.propose(torch.tensor([0]), torch.tensor([8]), Sampling(temperature=1.0), uniforms, (1,))
    assert proposal.lengths.tolist() == [3]
    rows = model(make_batch(model, [model.preparation.at(sample, torch.tensor([9]))]))
    torch.testing.assert_close(proposal.probabilities[0], model.logits(rows.hidden).softmax(-1), rtol=0, atol=1e-6)


def test_checkpoints_say_which_layout(
    make_model: MakeModel, tmp_path: Path, registry: Registry, adapter: Qwen3Adapter
) -> None:
    for predicts in (True, False):
        model, folder = make_model(anchor_predicts=predicts), tmp_path / str(predicts)
        save_draft(model, adapter, folder)
        assert read_draft_config(folder)["sample_from_anchor"] is predicts
        loaded = load_draft(folder, registry=registry, adapter=adapter)
        assert loaded.describe() == model.describe()
        assert loaded.describe().anchor_predicts is predicts


def test_greedy_output_is_the_targets(parity: Path, tmp_path: Path, registry: Registry, adapter: Qwen3Adapter) -> None:
    """A draft trained for the other layout guesses badly, and the output is the target's all the same."""
    recorded = json.loads((parity / "qwen3-decode-dflash" / "case.json").read_text())
    samples = recorded["by_confidence_threshold"]["0.0"]["samples"]
    folder = Path(shutil.copytree(parity / "qwen3-decode-dflash" / "draft", tmp_path / "draft"))
    config = read_draft_config(folder) | {"sample_from_anchor": False}
    (folder / "config.json").write_text(json.dumps(config))
    completions = decode(
        adapter.load(parity / "qwen3-target", dtype=torch.float32, device="cpu"),
        load_draft(folder, registry=registry, adapter=adapter).proposer(),
        [Request(id=str(i), prompt_ids=tuple(sample["prompt"]), seed=i) for i, sample in enumerate(samples)],
        sampling=Sampling(temperature=0.0),
        stop_ids=recorded["stop_token_ids"],
        max_new_tokens=recorded["max_new_tokens"],
        batch_size=3,
        max_length=64,
    )
    proposed = []
    for completion in completions:
        output = [*completion.prompt_ids, *completion.output_ids]
        assert output == recorded["target_greedy"][int(completion.id)]
        proposed += [one.proposal_length for one in completion.rounds]
    assert max(proposed) == 3


def test_a_block_of_one_slot_would_predict_nothing() -> None:
    assert DFlashOptions(block_size=1).num_predictions == 1
    with pytest.raises(ValueError, match="block_size"):
        DFlashOptions(block_size=1, anchor_predicts=False)
