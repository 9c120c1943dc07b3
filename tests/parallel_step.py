"""One worker of test_parallel_step.py: a draft's gradient of one optimizer step, under DDP or FSDP2 over gloo.

    RANK=0 WORLD_SIZE=2 python parallel_step.py FOLDER CASE...

A case is an algorithm, a split and a mode, such as dflash/even-ddp. FOLDER holds for every algorithm the draft, the
loss, and for every split this rank's micro-batches, as saved by the test. Rank 0 writes gradients there, a file a case.
Modes are those of train.parallel. With DEVICE=cuda both ranks compute on one GPU.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft
from deepspec_core.config.schema import LossOptions
from deepspec_core.contracts.draft import DraftBatch
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.rows.engine import build_engine
from deepspec_core.training.parallel import parallelise
from deepspec_core.training.reduction import StepSums, normalise
from deepspec_core.training.shards import is_sharded, whole
from deepspec_core.training.step import TrainingStep

DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    for case in cases:
        algorithm, _, step = case.partition("/")
        found = step_of(folder / algorithm, *step.split("-"))
        if torch.distributed.get_rank() == 0:
            save_file(found, folder / f"{case}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def step_of(folder: Path, split: str, mode: str) -> dict[str, torch.Tensor]:
    """Normalised gradients by parameter, their `norm` and the `loss`."""
    registry = load_plugins().registry
    adapter = draft_adapter(folder / "draft", registry=registry)
    draft = load_draft(folder / "draft", registry=registry, adapter=adapter).to(DEVICE)
    loss = LossOptions(terms=json.loads((folder / "terms.json").read_text()))
    world_size = torch.distributed.get_world_size()
    step = TrainingStep(draft.train(), build_engine(loss, registry))
    parallel = parallelise(step, mode, device=DEVICE, processes=world_size)
    trained = {name: value for name, value in draft.named_parameters() if value.requires_grad}
    assert all(is_sharded(value) == (mode == "fsdp") for value in trained.values())
    parallel.begin_step()
    sums = StepSums(DEVICE)
    share = folder / f"{split}-{torch.distributed.get_rank()}.pt"
    micro_batches = torch.load(share, weights_only=True, map_location=DEVICE)
    for number, saved in enumerate(micro_batches):
        with parallel.micro_batch(last=number + 1 == len(micro_batches)):
            result = parallel.module(batch_of(saved), with_metrics=True)
            result.total.backward()
        sums.add(result.denominator, result.metrics)
    vector = sums.reduce(["loss"], flag=False)
    norm = normalise(list(trained.values()), vector[0], world_size=world_size, clip_norm=1e9)
    assert not any(value.grad is not None for value in draft.parameters() if not value.requires_grad)
    gradients = {name: gradient_of(value).cpu().contiguous() for name, value in trained.items()}
    return {**gradients, "norm": norm.cpu().reshape(1), "loss": (vector[2] / vector[3]).cpu().reshape(1)}


def batch_of(saved: dict[str, Any]) -> DraftBatch:
    features = TargetFeatures(hidden=saved.pop("hidden"), last_hidden=saved.pop("last_hidden"))
    return DraftBatch(features=features, **saved)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return whole(parameter.grad)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    # All is written. Threads of the process group that are still there would abort the interpreter's own end.
    os._exit(0)
