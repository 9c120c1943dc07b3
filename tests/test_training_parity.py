"""The training step, end to end, against the published implementation: loss, gradients and metrics as recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from deepspec_core.blocks.published import load_draft, published_name
from deepspec_core.blocks.row_engine import build_engine
from deepspec_core.config.schema import LossOptions, WeightingOptions
from deepspec_core.config.weighting_options import DecayOptions
from deepspec_core.contracts.draft import DraftBatch, Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.plugins import load_plugins
from deepspec_core.training.step import TrainingStep
from deepspec_dflash.anchors import AnchorPreparation
from deepspec_targets.qwen3 import Qwen3Adapter

PARITY = Path(__file__).parent / "parity"


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_dflash_step(chunk_rows: int | None) -> None:
    folder = PARITY / "qwen3-dflash"
    recorded = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    registry = load_plugins().registry
    adapter = Qwen3Adapter(AutoConfig.from_pretrained(PARITY / "qwen3-target"))
    draft = load_draft(folder / "draft", registry=registry, adapter=adapter)
    assert isinstance(draft.preparation, AnchorPreparation)
    prepared = []
    for index, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        sample = Sample(
            id=str(index),
            input_ids=inputs["input_ids"][index, :length],
            loss_mask=inputs["loss_mask"][index, :length].bool(),
            original_length=length,
        )
        drawn = inputs["anchor_positions"][index][inputs["block_keep_mask"][index]]
        prepared.append(draft.preparation.at(sample, drawn))
    batch = DraftBatch(
        input_ids=inputs["input_ids"],
        loss_mask=inputs["loss_mask"].bool(),
        attention_mask=inputs["attention_mask"].bool(),
        features=TargetFeatures(hidden=inputs["target_hidden_states"], last_hidden=inputs["target_last_hidden_states"]),
        prepared=draft.preparation.collate(prepared),
    )
    loss = LossOptions(
        terms={"ce": 1.0},
        weighting=WeightingOptions(
            type="decay", options=DecayOptions(gamma=recorded["loss_config"]["loss_decay_gamma"])
        ),
        chunk_rows=chunk_rows,
    )
    result = TrainingStep(draft, build_engine(loss, registry))(batch, with_metrics=True)
    mean = result.total / result.denominator
    mean.backward()

    assert mean.item() == pytest.approx(recorded["loss"], rel=1e-4)
    figures = {name: (above / below).item() for name, (above, below) in result.metrics.items()}
    for name in ("accept_rate@0", "accept_rate@1", "accept_rate@2", "accept_rate@3", "tau_probabilistic", "loss"):
        assert figures[name] == pytest.approx(recorded["metrics"][name], rel=1e-4), name
    gradients = load_file(folder / "grads.safetensors")
    names = draft.describe().weight_names
    found = {published_name(name, names): value.grad for name, value in draft.named_parameters() if value.requires_grad}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = found[name] - gradient  # type: ignore[operator]
        assert torch.linalg.vector_norm(difference) <= 1e-3 * torch.linalg.vector_norm(gradient), name
