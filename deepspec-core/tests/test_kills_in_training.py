"""Training killed at random moments, of one process or two in shards: it ends with the weights of one undisturbed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_trainer import ROUNDING, lines, run
from torch.testing import assert_close
from training_kills import OFTEN, SAMPLES

from deepspec_core.testing.tiny_draft import TinySource
from deepspec_core.training.checkpoint import latest

SCRIPT = Path(__file__).with_name("training_kills.py")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel", "kills"), [(1, "auto", 20), (2, "fsdp", 20)])
def test_twenty_kills(
    ranks: int, parallel: str, kills: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "straight", OFTEN, source=TinySource(SAMPLES))
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(ranks), parallel, str(kills), "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        sys.stdout.write(f"\n{ranks} processes, {len(said['hits'])} kills: {dict(Counter(said['hits']))}\n")
    assert len(said["hits"]) >= kills
    expected = latest(tmp_path / "straight")
    assert expected is not None
    for folder in map(Path, said["folders"]):
        found = latest(folder)
        assert found is not None
        assert found.name == expected.name
        for file in ("state/weights.safetensors", "state/optimizer.safetensors", "draft/model.safetensors"):
            assert_close(load_file(found / file), load_file(expected / file), **ROUNDING)
        # Every step is logged once, and no rest of a kill is left.
        assert [line["step"] for line in lines(folder)] == list(range(1, 25))
        for one, other in zip(lines(folder), lines(tmp_path / "straight"), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith((".", "damaged"))]
