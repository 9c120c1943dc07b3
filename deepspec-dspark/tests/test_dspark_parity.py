"""The recorded vectors of the published implementation: training exactly, decoding token for token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from safetensors.torch import load_file
from torch import Tensor

from deepspec_core.blocks.published import load_draft, published_name
from deepspec_core.blocks.row_engine import RowResult, build_engine
from deepspec_core.config.schema import LossOptions, WeightingOptions
from deepspec_core.config.weighting_options import DecayOptions
from deepspec_core.contracts.draft import DraftBatch, PreparedSample
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.rows import Rows
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.registry import Registry
from deepspec_dspark.model import DSparkModel

TRAINING = ("vanilla", "gated", "rnn", "confidence-plain")
DECODING = ("decode-dspark", "decode-dspark-rnn")
PUBLISHED_NAMES = {"loss": "loss", "loss/ce": "ce_loss", "loss/tv": "l1_loss", "loss/confidence": "confidence_loss"}


@frozen
class Case:
    """A recorded training case and what this implementation makes of it."""

    folder: Path
    model: DSparkModel
    prepared: list[PreparedSample]
    num_tokens: int
    rows: Rows
    result: RowResult
    expected: dict[str, Tensor]
    recorded: dict[str, Any]

    def ratio(self, name: str) -> Tensor:
        """A metric's value."""
        above, below = self.result.metrics[name]
        return above / below


@pytest.fixture(params=TRAINING)
def case(
    request: pytest.FixtureRequest,
    family: str,
    parity: Path,
    registry: Registry,
    adapter: TargetAdapter,
    recorded_batch: Callable[[DSparkModel, Path], tuple[DraftBatch, list[PreparedSample]]],
) -> Case:
    folder = parity / f"{family}-dspark-{request.param}"
    model = load_draft(folder / "draft", registry=registry, adapter=adapter)
    assert isinstance(model, DSparkModel)
    recorded = json.loads((folder / "case.json").read_text())
    settings = recorded["loss_config"]
    loss = LossOptions(
        terms={
            "ce": settings["ce_loss_alpha"],
            "tv": settings["l1_loss_alpha"],
            "confidence": settings["confidence_head_alpha"],
        },
        weighting=WeightingOptions(type="decay", options=DecayOptions(gamma=settings["loss_decay_gamma"])),
    )
    batch, prepared = recorded_batch(model, folder)
    rows = model(batch)
    result = build_engine(loss, registry)(rows, model.heads(), with_metrics=True)
    expected = load_file(folder / "expected.safetensors")
    return Case(folder, model, prepared, batch.input_ids.shape[1], rows, result, expected, recorded)


def _close(found: Tensor, expected: Tensor, relative: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def test_rows_match_the_recording(case: Case) -> None:
    rows, model, counted = case.rows, case.model, case.expected["eval_mask"]
    assert len(rows.hidden) == int(counted.sum())
    assert rows.target_ids is not None
    assert torch.equal(rows.target_ids, case.expected["target_ids"][counted])
    assert model.markov_head is not None
    logits = model.logits(rows.hidden) + model.markov_head.markov_w2(rows.correction)
    _close(logits, case.expected["draft_logits"][counted], 1e-4)
    _close(rows.extras["confidence_logits"], case.expected["confidence_logits"][counted], 1e-4)
    target_logits = model.logits(rows.target_hidden)[rows.target_index]
    _close(target_logits, case.expected["aligned_target_logits"][counted], 1e-4)


def test_loss_and_gradients_match_the_recording(case: Case) -> None:
    loss = case.result.total / (case.result.denominator + 1e-6)
    _close(loss.reshape(1), case.expected["loss"], 1e-4)
    loss.backward()
    recorded = load_file(case.folder / "grads.safetensors")
    names = case.model.describe().weight_names
    trained = {published_name(name, names): part for name, part in case.model.named_parameters() if part.requires_grad}
    assert trained.keys() == recorded.keys()
    for name, gradient in recorded.items():
        assert trained[name].grad is not None, name
        _close(trained[name].grad, gradient, 1e-3)


def test_metrics_match_the_recording(case: Case) -> None:
    recorded = dict(case.recorded["metrics"])
    found = {PUBLISHED_NAMES.get(name, name): case.ratio(name) for name in case.result.metrics}
    # What preparation counts is published as means over sequences, and as shares of what there could have been.
    counts = [one.counts for one in case.prepared]
    options = case.model.options
    shares = {
        "valid_anchors": ([one["anchor_candidates"] for one in counts], case.num_tokens),
        "sampled_anchors": ([one["anchors"] for one in counts], options.num_anchors),
        "block_supervised_tokens": ([one["counted_slots"] / one["anchors"] for one in counts], options.block_size),
    }
    for name, (values, possible) in shares.items():
        mean = torch.tensor(values, dtype=torch.float32).mean()
        found |= {f"{name}_abs": mean, f"{name}_ratio": mean / possible}
    assert recorded.keys() <= found.keys()
    for name, value in recorded.items():
        assert found[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("threshold", ["0.0", "0.4"])
@pytest.mark.parametrize("name", DECODING)
def test_decoding_matches_the_recording(
    family: str, parity: Path, registry: Registry, adapter: TargetAdapter, name: str, threshold: str, batch_size: int
) -> None:
    folder = parity / f"{family}-{name}"
    recorded = json.loads((folder / "case.json").read_text())
    assert recorded["by_confidence_threshold"].keys() == {"0.0", "0.4"}
    samples = recorded["by_confidence_threshold"][threshold]["samples"]
    model = load_draft(folder / "draft", registry=registry, adapter=adapter)
    completions = decode(
        adapter.load(parity / f"{family}-target", dtype=torch.float32, device="cpu"),
        model.proposer(),
        [Request(id=str(i), prompt_ids=tuple(s["prompt"]), seed=i) for i, s in enumerate(samples)],
        sampling=Sampling(temperature=0.0),
        stop_ids=recorded["stop_token_ids"],
        max_new_tokens=recorded["max_new_tokens"],
        batch_size=batch_size,
        max_length=64,
        confidence_threshold=float(threshold),
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
