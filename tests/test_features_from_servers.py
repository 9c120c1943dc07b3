"""Runs whose features come from servers: the same draft as online, the same cache, and what is said when it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_stand_in import ONE_AT_A_TIME, FeatureStandIn, States, feature_servers
from safetensors.torch import load_file

from deepspec_core.cli.main import main
from deepspec_core.interface.models import Target

TAPS = (2, 4, 6, 8, 10)
MODEL = "builtin:tiny-qwen3"
SMALL = ["--smoke", "--set", "run.threads=1", "--stages", "train", "--set", 'run.stages=["regenerate", "train"]']
ONE = ["--set", "train.micro_batch_size=1"]


@pytest.fixture
def states(target: Target) -> Iterator[States]:
    """ids -> [T, K, H] of the built-in target as vLLM gives them: the final state before the last norm."""
    seen: list[torch.Tensor] = []
    model: Any = target.model
    hook = model.decoder.norm.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))

    def computed(ids: list[int]) -> torch.Tensor:
        input_ids = torch.tensor([ids])
        with ONE_AT_A_TIME:
            found = model.features(input_ids, torch.ones_like(input_ids).bool(), None, None, TAPS)
            hidden = found.hidden[0].view(len(ids), len(TAPS), -1)
            return torch.cat([hidden, seen.pop()[0][:, None]], 1)

    yield computed
    hook.remove()


@pytest.fixture
def exchange(tmp_path: Path) -> Path:
    (tmp_path / "exchange").mkdir()
    return tmp_path / "exchange"


@pytest.fixture
def servers(exchange: Path, target: Target, states: States) -> Iterator[list[FeatureStandIn]]:
    """Two servers of the built-in target, in float32."""
    ids = [*(tap + 1 for tap in TAPS), target.model.architecture.num_layers]
    running = [FeatureStandIn(states, ids, exchange, model=MODEL) for _ in range(2)]
    for server in running:
        server.normed = "false"
    with feature_servers(*running):
        yield running


def served(exchange: Path, servers: list[FeatureStandIn], *changes: str) -> list[str]:
    addresses = json.dumps([server.address for server in servers])
    settings = ["features.mode=server", f"features.servers={addresses}", f"features.exchange='{exchange}'", *changes]
    return [part for setting in settings for part in ("--set", setting)]


def folder_of(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def weights(run_file: Path) -> dict[str, torch.Tensor]:
    return load_file(folder_of(run_file) / "draft" / "model.safetensors")


def test_a_draft_trained_from_servers_is_the_one_trained_online(
    finished_copy: Path, exchange: Path, servers: list[FeatureStandIn]
) -> None:
    """To the bit: one sequence a batch, float32 files, and the same operations on the same memory."""
    run = ["run", str(finished_copy), *SMALL, *ONE, "--force", "train"]
    assert main([*run, "--set", "features.mode=online"]) == 0
    expected = weights(finished_copy)
    assert main([*run, *served(exchange, servers)]) == 0
    found = weights(finished_copy)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
