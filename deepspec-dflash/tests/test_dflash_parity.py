"""The recorded vectors of the published implementation: training exactly, decoding token for token."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deepspec_core.config.schema import LossOptions, WeightingOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.testing.draft_checks import check_near
from deepspec_core.testing.recorded import FORWARD, Recordings, TrainingCase
from deepspec_core.training.step import TrainingStep
from deepspec_dflash.model import DFlashModel

SOFTCAP = {"qwen3": None, "gemma4": 30.0}
PREPARED = ("valid_anchors", "sampled_anchors", "block_supervised_tokens")  # what preparation counts


@pytest.fixture
def case(recordings: Recordings, family: str) -> TrainingCase:
    found = recordings.training(f"{family}-dflash")
    assert isinstance(found.draft, DFlashModel)
    return found


def test_rows_match_the_recording(case: TrainingCase, family: str) -> None:
    model, expected = case.draft, case.expected
    rows, heads, counted = model(case.batch()), model.heads(), expected["eval_mask"]
    assert len(rows.hidden) == int(counted.sum())
    check_near(model.logits(rows.hidden), expected["draft_logits"][counted], FORWARD)
    assert torch.equal(rows.target_ids, expected["target_ids"][counted])
    target_logits = F.linear(rows.target_hidden, heads.target)
    assert heads.softcap == SOFTCAP[family]
    if heads.softcap is not None:
        target_logits = heads.softcap * torch.tanh(target_logits / heads.softcap)
    check_near(target_logits[rows.target_index], expected["aligned_target_logits"][counted], FORWARD)
    assert len(rows.target_hidden) < len(rows.hidden), "each target position once"
    live = counted.any(-1).nonzero().tolist()
    slots = [(block, slot) for block, (b, a) in enumerate(live) for slot in range(int(counted[b, a].sum()))]
    assert list(zip(rows.block.tolist(), rows.slot.tolist(), strict=True)) == slots


@pytest.mark.parametrize("path", ["split", "dense"])
def test_loss_and_gradients_match_the_recording(case: TrainingCase, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec_dflash.attention.choose", lambda queries, layout, num_tokens: path)
    rows = case.draft(case.batch())
    weights = rows.weight * torch.exp(-rows.slot / 4.0)
    losses = F.cross_entropy(case.draft.logits(rows.hidden), rows.target_ids, reduction="none")
    case.check_loss((weights * losses).sum() / (weights.sum() + 1e-6))


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_a_training_step_matches_the_recording(case: TrainingCase, registry: Registry, chunk_rows: int | None) -> None:
    decay = DecayOptions(gamma=case.record["loss_config"]["loss_decay_gamma"])
    weighting = WeightingOptions(type="decay", options=decay)
    loss = LossOptions(terms={"ce": 1.0}, weighting=weighting, chunk_rows=chunk_rows)
    result = TrainingStep(case.draft, build_engine(loss, registry))(case.batch(), with_metrics=True)
    case.check_loss(result.total / result.denominator)
    case.check_metrics(result.metrics, leave_out=PREPARED)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_decoding_matches_the_recording(recordings: Recordings, family: str, batch_size: int) -> None:
    recordings.decoding(f"{family}-decode-dflash").check(batch_size=batch_size)
