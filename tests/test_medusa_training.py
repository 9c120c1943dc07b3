"""A head for each slot has a user: a Medusa-1 draft, from its rows to a run's checkpoint."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from medusa_draft import Medusa, MedusaOptions
from safetensors.torch import load_file

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft
from deepspec_core.cli.main import main
from deepspec_core.config.schema import LossOptions, WeightingOptions
from deepspec_core.contracts.draft import DraftBatch, Sample
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.interface.models import Target
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.training.loader import MicroBatches, Plan

PLUGIN = """
from deepspec_core.plugins import DraftModelSpec, hookimpl
from medusa_draft import MedusaOptions, is_medusa

@hookimpl
def deepspec_draft_models():
    yield DraftModelSpec(
        name="medusa", summary="", build="medusa_draft:Medusa", options=MedusaOptions, class_suffix="MedusaModel",
        recognise=is_medusa, options_of="medusa_draft:options_of",
        default_loss={"terms": {"ce": 1.0}, "weighting": {"type": "decay", "gamma": 4.48}},
    )
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The draft type `medusa`, as an installed plugin."""
    site = tmp_path / "site"
    info = site / "fake_medusa-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "medusa_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-medusa\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deepspec]\nmedusa = medusa_plugin\n")
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("medusa_plugin", None)


def batch_of(draft: Medusa, target: Any) -> DraftBatch:
    samples = []
    for number, length in enumerate((9, 14, 6)):
        ids = (torch.arange(length) * 7 + number * 5) % 38 + 2
        supervised = torch.arange(length) >= length // 3
        samples.append(Sample(id=str(number), input_ids=ids, loss_mask=supervised, original_length=length))
    source = OnlineFeatures(samples, target.model, draft.taps)
    host = MicroBatches(source, draft.preparation, seed=0)[Plan(epoch=0, indices=(0, 1, 2))]
    return host.to_draft_batch(source, torch.device("cpu"))


def by_a_loop(draft: Medusa, batch: DraftBatch, decay: float) -> torch.Tensor:
    """sum over positions and heads k of decay ** k * cross-entropy, over the sum of decay ** k."""
    total, weights = torch.zeros(()), 0.0
    for sequence, position in zip(batch.prepared["sequence"], batch.prepared["position"], strict=True):
        hidden_H = batch.features.last_hidden[sequence, position]
        for slot, block in enumerate(draft.blocks):
            at = int(position) + 2 + slot
            if at < batch.input_ids.shape[1] and batch.loss_mask[sequence, at]:
                logits_V = draft.slot_heads[slot] @ (hidden_H + F.silu(block(hidden_H)))
                total = total + decay**slot * F.cross_entropy(logits_V, batch.input_ids[sequence, at])
                weights += decay**slot
    return total / weights


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("chunk_rows", [4, None])
def test_the_loss_and_its_gradients_are_those_of_a_loop(
    tiny_target: Callable[..., Any], registry: Registry, kernels: str, chunk_rows: int | None
) -> None:
    target = tiny_target("qwen3")
    torch.manual_seed(0)
    draft = Medusa(MedusaOptions(num_heads=3), target.adapter, (1, 3))
    draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    assert torch.equal(draft.slot_heads[2], target.model.head_weight())
    batch = batch_of(draft, target)
    weighting = WeightingOptions(type="decay", options=DecayOptions(gamma=-1 / math.log(0.8)))
    loss = LossOptions(terms={"ce": 1.0}, weighting=weighting, kernels=kernels, chunk_rows=chunk_rows)
    result = build_engine(loss, registry)(draft(batch), draft.heads(), with_metrics=True)
    expected = by_a_loop(draft, batch, 0.8)
    torch.testing.assert_close(result.total / result.denominator, expected)
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    found, wanted = (torch.autograd.grad(one, parameters) for one in (result.total / result.denominator, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert {"accuracy@0", "accuracy@1", "accuracy@2", "accept_rate@2"} <= set(result.metrics)


def test_a_run_trains_saves_and_loads_it(
    installed: None, finished: Path, target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = finished.parent / "runs" / "quickstart-dflash-smoke" / "cache"
    text = finished.read_text().replace('["regenerate", "cache", "train", "evaluate"]', '["train"]')
    text = text.replace("[cache]\n", f'[cache]\npath = "{cache}"\n')
    before, _, after = text.partition("[draft]")
    run_file = tmp_path / "medusa.toml"
    run_file.write_text(f'{before}[draft]\ntype = "medusa"\nnum_heads = 2\n\n[train]{after.partition("[train]")[2]}')
    run = ["run", str(run_file), "--smoke", "--set", "run.threads=1", "--set", "train.log_every=1"]
    assert main(run) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "quickstart-dflash-smoke"
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    registry = load_plugins().registry
    loaded = load_draft(folder / "draft", registry=registry, adapter=draft_adapter(folder / "draft", registry=registry))
    assert isinstance(loaded, Medusa)
    assert loaded.options == MedusaOptions(num_heads=2)
    stored = load_file(folder / "draft" / "model.safetensors")["slot_heads"]
    assert stored.shape == (2, *target.model.head_weight().shape)
    assert torch.equal(loaded.slot_heads, stored)
    assert not torch.equal(stored[0], stored[1]), "each head is trained on its own slot"
    assert not torch.equal(stored[0], target.model.head_weight())
