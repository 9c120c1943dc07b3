"""Activation checkpointing: the same losses and gradients in less memory, for every algorithm of core's layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed_batches import ALONE, PACKED, PACKING, samples_of

from deepspec_core.cli.main import main
from deepspec_core.config.schema import LossOptions
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.errors import ConfigError
from deepspec_core.estimating.memory import LiveBytes
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.layers.recomputing import recompute_layers
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.testing.draft_checks import check_all_near, gradients_of
from deepspec_core.testing.random_batches import with_large_weights
from deepspec_core.testing.tiny_draft import TinyDraft
from deepspec_core.training.loader import MicroBatches
from deepspec_core.training.step import TrainingStep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", PACKING)
@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
def test_losses_and_gradients_are_the_same_in_less_memory(
    tiny_target: Callable[..., Any],
    tiny_draft: Callable[..., DraftModel],
    registry: Registry,
    algorithm: str,
    family: str,
    dtype: torch.dtype,
) -> None:
    target = tiny_target(family)
    draft = with_large_weights(tiny_draft(algorithm, target, num_layers=2))
    draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    source = OnlineFeatures(samples_of(40), target.model, draft.describe().taps)
    # Alone, layers read copies of weights, and so do those that are computed again.
    engine = build_engine(LossOptions(terms={"kl": 1.0}), registry)
    step = TrainingStep(draft, engine, compute_dtype=dtype, alone=True)
    plan = ALONE if dtype == torch.float32 else PACKED
    batch = MicroBatches(source, draft.preparation, seed=0)[plan].to_draft_batch(source, torch.device("cpu"))
    outcomes, kept = [], []
    for recomputes in (False, True):
        if recomputes:
            recompute_layers(draft)
        with LiveBytes() as live:
            total = step(batch).total
            kept.append(live.now)
        outcomes.append((total.detach(), gradients_of(total, draft)))
    assert kept[1] < 0.75 * kept[0], f"{kept[1]} of {kept[0]} bytes are alive between forward and backward"
    # The same operations on the same numbers, in other memory.
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-6, atol=0)
    assert outcomes[0][1].keys() == outcomes[1][1].keys()
    check_all_near(outcomes[1][1], outcomes[0][1], 1e-6 if dtype == torch.float32 else 1e-2)


def test_decoding_recomputes_nothing(tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel]) -> None:
    draft = tiny_draft("dflash", tiny_target("qwen3"))
    recompute_layers(draft)
    with torch.no_grad():
        layer = draft.backbone.draft_layers()[0]
        assert layer(torch.ones(2, 3, 32), lambda hidden: hidden).shape == (2, 3, 32)


def test_a_draft_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be computed again"):
        recompute_layers(TinyDraft())


@pytest.mark.slow
def test_a_run_asks_for_it_and_its_estimate_says_what_it_saves(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for wanted in ("false", "true"):
        asked = ["estimate", str(run_file), "--json", "--set", "train.micro_batch_size=16"]
        asked += ["--set", f"train.checkpoint_activations={wanted}"]
        assert main(asked) == 0
        said.append(json.loads(capsys.readouterr().out))
    most = [one["memory"]["phase_bytes"]["backward"] for one in said]
    assert most[1] < 0.8 * most[0]
    assert said[1]["flops_per_step"]["total"] > said[0]["flops_per_step"]["total"], "it is computed twice"
