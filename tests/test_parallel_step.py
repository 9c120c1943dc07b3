"""TrainingStep under DDP and FSDP2, two processes over gloo: gradients of a step are those of one process.

Every algorithm; ranks with unequal shares and unlike numbers of micro-batches, of which one, or all, have nothing to
supervise.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepspec_core.checkpoints.published import save_draft
from deepspec_core.config.schema import LossOptions
from deepspec_core.contracts.draft import DraftBatch, DraftModel, Sample
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.training.loader import MicroBatches, Plan
from deepspec_core.training.step import TrainingStep

GPU = pytest.param(
    "cuda", marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
)
WORKER = Path(__file__).with_name("parallel_step.py")
TERMS = {"dflash": {"ce": 1.0}, "dspark": {"ce": 0.1, "tv": 0.9, "confidence": 1.0}, "eagle3": {"soft_ce": 1.0}}
# Sample numbers of each rank's micro-batches; samples 4 and 5 have nothing to supervise.
SPLITS = {
    "even": [[[0, 1], [2]], [[3], [4, 5]]],
    "idle": [[[0, 1], [2, 3]], [[4], [5]]],
    "uneven": [[[0], [1], [2]], [[3, 4, 5]]],
}


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(6):
        ids = torch.randint(3, 38, (12 + 3 * number,), generator=generator)
        supervised = torch.arange(len(ids)) >= (4 if number < 4 else len(ids))
        made.append(Sample(id=str(number), input_ids=ids, loss_mask=supervised, original_length=len(ids)))
    return made


def saved(batch: DraftBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "loss_mask": batch.loss_mask,
        "position_ids": batch.position_ids,
        "document_ids": batch.document_ids,
        "prepared": dict(batch.prepared),
        "hidden": batch.features.hidden,
        "last_hidden": batch.features.last_hidden,
    }


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_two_processes_give_the_gradient_of_one(
    device: str,
    tiny_target: Callable[..., Any],
    tiny_draft: Callable[..., DraftModel],
    registry: Registry,
    tmp_path: Path,
) -> None:
    """The two take the steps of all algorithms: most of their time is their imports."""
    target = tiny_target("qwen3")
    drafts, losses = {}, {}
    for algorithm in registry.trained_drafts():
        draft = drafts[algorithm] = tiny_draft(algorithm, target).train()
        terms, folder = TERMS.get(algorithm, {"ce": 1.0}), tmp_path / algorithm
        losses[algorithm] = _alone(draft, target, terms, registry, folder)
        save_draft(draft, target.adapter, folder / "draft")
        (folder / "terms.json").write_text(json.dumps(terms))
    # One GPU for both, which NCCL refuses; and gloo does not shard tensors of a GPU.
    modes = ("ddp", "fsdp") if device == "cpu" else ("ddp",)
    cases = [f"{algorithm}/{split}-{mode}" for algorithm in drafts for split in SPLITS for mode in modes]
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), *cases],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "DEVICE": device},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)

    for case in cases:
        algorithm = case.split("/")[0]
        expected = {name: value.grad for name, value in drafts[algorithm].named_parameters() if value.requires_grad}
        norm = torch.stack([gradient.norm() for gradient in expected.values() if gradient is not None]).norm()
        found = load_file(tmp_path / f"{case}.safetensors")
        torch.testing.assert_close(found.pop("loss")[0], losses[algorithm], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.pop("norm")[0], norm, rtol=1e-5, atol=1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=f"{name}, {case}")


def _alone(draft: DraftModel, target: Any, terms: dict[str, float], registry: Registry, folder: Path) -> torch.Tensor:
    """The loss of the step in this process, whose gradients the draft keeps; each rank's micro-batches in `folder`."""
    folder.mkdir()
    source = OnlineFeatures(samples(), target.model, draft.describe().taps)
    batches = MicroBatches(source, draft.preparation, seed=0)

    def batch(indices: list[int]) -> DraftBatch:
        return batches[Plan(epoch=0, indices=tuple(indices))].to_draft_batch(source, torch.device("cpu"))

    step = TrainingStep(draft, build_engine(LossOptions(terms=terms), registry))
    result = step(batch([0, 1, 2, 3, 4, 5]))
    (result.total / result.denominator).backward()
    for split, shares in SPLITS.items():
        for rank, share in enumerate(shares):
            torch.save([saved(batch(indices)) for indices in share], folder / f"{split}-{rank}.pt")
    return (result.total / result.denominator).detach()
