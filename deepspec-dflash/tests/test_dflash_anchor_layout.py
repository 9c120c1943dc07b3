"""`anchor_predicts = false`: the anchor's slot predicts nothing, K slots make K - 1 predictions of the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepspec_core.checkpoints.published import load_draft, read_draft_config, save_draft
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.driven_proposer import SAMPLED, DrivenProposer
from deepspec_core.testing.random_batches import features_of, padded_batch, random_sample
from deepspec_core.testing.recorded import Recordings
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import DFlashOptions

MakeModel = Callable[..., DFlashModel]


def test_rows_come_from_the_slots_after_the_anchor(make_model: MakeModel) -> None:
    sample, anchors = random_sample("a", 20), torch.tensor([3, 9, 17])
    every = make_model(block_size=4)
    others = make_model(block_size=4, anchor_predicts=False)
    outputs = every.block_hidden(padded_batch(every, [every.preparation.at(sample, anchors)]))
    prepared = others.preparation.at(sample, anchors)
    rows = others(padded_batch(others, [prepared]))
    # Label k is x[a+1+k] in both layouts; slot k + 1, which stands at its position, predicts it here.
    assert prepared.tensors["labels"][0].tolist() == sample.input_ids[4:7].tolist()
    assert list(zip(rows.block.tolist(), rows.slot.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1),
    ]  # fmt: skip
    torch.testing.assert_close(rows.hidden, outputs[rows.block, rows.slot + 1], rtol=0, atol=1e-6)
    assert rows.target_hidden is not None
    positions = anchors[rows.block] + rows.slot
    assert torch.equal(rows.target_hidden[rows.target_index], features_of(sample).last_hidden[positions])
    assert torch.equal(rows.target_ids, sample.input_ids[positions + 1])


def test_decoding_sees_what_training_sees(make_model: MakeModel) -> None:
    model, sample = make_model(block_size=4, anchor_predicts=False), random_sample("a", 20)
    driven = DrivenProposer(model, num_slots=1)
    assert driven.proposer.max_tokens == model.describe().max_tokens == 3
    driven.start({0: (sample, 9)})
    proposal = driven.propose([0], SAMPLED, limits=[8])
    assert proposal.lengths.tolist() == [3]
    rows = model(padded_batch(model, [model.preparation.at(sample, torch.tensor([9]))]))
    torch.testing.assert_close(proposal.probabilities[0], model.logits(rows.hidden).softmax(-1), rtol=0, atol=1e-6)


def test_checkpoints_say_which_layout(
    make_model: MakeModel, tmp_path: Path, registry: Registry, recordings: Recordings
) -> None:
    adapter = recordings.adapter("qwen3")
    for predicts in (True, False):
        model, folder = make_model(anchor_predicts=predicts), tmp_path / str(predicts)
        save_draft(model, adapter, folder)
        assert read_draft_config(folder)["sample_from_anchor"] is predicts
        loaded = load_draft(folder, registry=registry, adapter=adapter)
        assert loaded.describe() == model.describe()
        assert loaded.describe().anchor_predicts is predicts


def test_greedy_output_is_the_targets(tmp_path: Path, recordings: Recordings) -> None:
    """A draft trained for the other layout guesses badly, and the output is the target's all the same."""
    case = recordings.decoding("qwen3-decode-dflash")
    copy = recordings.copy("qwen3-decode-dflash", tmp_path / "draft", sample_from_anchor=False)
    draft = load_draft(copy, registry=recordings.registry, adapter=recordings.adapter("qwen3"))
    completions = case.replay(draft.proposer(), batch_size=3)
    outputs = [[*completion.prompt_ids, *completion.output_ids] for completion in completions]
    assert outputs == case.record["target_greedy"]
    assert max(one.proposal_length for completion in completions for one in completion.rounds) == 3


def test_a_block_of_one_slot_would_predict_nothing() -> None:
    assert DFlashOptions(block_size=1).num_predictions == 1
    with pytest.raises(ValueError, match="block_size"):
        DFlashOptions(block_size=1, anchor_predicts=False)
