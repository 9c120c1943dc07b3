"""One run file under torchrun and under `accelerate launch`: two processes train what `deepspec run` trains alone.

In shards under one and with copies under the other. What accelerate's launcher is told of sharding and precision does
not count: the run file decides.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# On a machine without GPUs, too, this is how accelerate starts several processes: each finds the CPU.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE_FSDP = [
    *ACCELERATE[:2],
    *ACCELERATE[3:],
    "--use_fsdp",
    "--fsdp_version=2",
    "--fsdp_sharding_strategy=FULL_SHARD",
]
_ROUNDING = 1e-4


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


@pytest.mark.parametrize(
    ("launcher", "parallel", "told"),
    [
        pytest.param(TORCHRUN, "fsdp", "parallel: fsdp", id="torchrun"),
        pytest.param([*ACCELERATE, "--mixed_precision=bf16"], "ddp", "parallel: ddp", id="accelerate"),
        pytest.param(ACCELERATE_FSDP, "auto", "parallel: ddp", id="accelerate-fsdp"),
    ],
)
def test_the_same_file(finished: Path, finished_copy: Path, launcher: list[str], parallel: str, told: str) -> None:
    own = ["--smoke", "--stages", "train", "--force", "train", "--set", "run.threads=1"]
    command = [sys.executable, *launcher, "-m", "deepspec_core", "run", str(finished_copy), *own]
    command += ["--set", f"train.parallel={parallel}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert told in done.stderr
    assert "2 processes" in done.stderr
    found, expected = (load_file(_folder(path) / "draft" / "model.safetensors") for path in (finished_copy, finished))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = torch.linalg.vector_norm((found[name] - value).double())
        assert difference <= _ROUNDING * torch.linalg.vector_norm(value.double()) + 1e-9, name
    losses = [
        [json.loads(line)["loss"] for line in (_folder(path) / "train" / "metrics.jsonl").read_text().splitlines()]
        for path in (finished_copy, finished)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
