"""What an accelerator computes is what the CPU computes: online features, a training step, decoding, a step of two.

Every test runs on the CPU too. There its reduced precision is compared with fp32, so that its bounds are seen to hold,
and the code of the test has run before an accelerator is at hand. Kernels have tests of their own, beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.config.schema import LossOptions
from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.targets.opening import load_target
from deepspec_core.testing.draft_checks import gradients_of
from deepspec_core.testing.random_batches import with_large_weights
from deepspec_core.training.loader import MicroBatches, Plan
from deepspec_core.training.step import TrainingStep

GPU = pytest.param(
    "cuda", marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
)
ON = pytest.mark.parametrize("device", ["cpu", GPU])
INSTALLED = load_plugins().registry
ALGORITHM = pytest.mark.parametrize("algorithm", INSTALLED.trained_drafts())
TERMS = {"dspark": {"ce": 0.1, "tv": 0.9, "confidence": 1.0}, "eagle3": {"soft_ce": 1.0}}
CPU = torch.device("cpu")
# Products in another order. TF32 is off unless a program asks for it.
SAME = 2e-4
# bfloat16 has 8 bits: a part in 256 of each number, less where many are averaged.
ROUNDED, ALIKE = 3e-2, 0.99


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(11)
    made = []
    for number, length in enumerate((17, 9, 23)):
        ids = torch.randint(3, 38, (length,), generator=generator)
        made.append(Sample(id=str(number), input_ids=ids, loss_mask=torch.arange(length) >= 3, original_length=length))
    return made


def cosine(found: Tensor, expected: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(found.flatten().cpu().double(), expected.flatten().double(), 0))


@pytest.mark.parametrize("family", INSTALLED.names("target"))
@ON
def test_online_features(tiny_target: Callable[..., Any], family: str, device: str) -> None:
    target = tiny_target(family)
    batch = [row.input_ids for row in samples()]
    ids_BT = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True).bool()
    expected = target.model.features(ids_BT, mask_BT, None, None, (-1, 1, 3))
    for dtype in (torch.float32, torch.bfloat16):
        there = load_target(target.adapter, target.where, dtype=dtype, device=device)
        found = there.features(ids_BT.to(device), mask_BT.to(device), None, None, (-1, 1, 3))
        for name in ("hidden", "last_hidden"):
            one, other = getattr(found, name)[mask_BT.to(device)], getattr(expected, name)[mask_BT]
            if dtype == torch.float32:
                torch.testing.assert_close(one.cpu(), other, rtol=SAME, atol=SAME)
            else:
                assert cosine(one, other) > ALIKE


@ALGORITHM
@ON
def test_a_training_step(
    tiny_target: Callable[..., Any],
    tiny_draft: Callable[..., DraftModel],
    registry: Registry,
    algorithm: str,
    device: str,
) -> None:
    """In fp32 losses and gradients are the CPU's to rounding. In bfloat16 they are near and point the same way."""
    target = tiny_target("qwen3")
    draft = with_large_weights(tiny_draft(algorithm, target)).train()
    source: FeatureSource = OnlineFeatures(samples(), target.model, draft.describe().taps)
    engine = build_engine(LossOptions(terms=TERMS.get(algorithm, {"ce": 1.0})), registry)
    host = MicroBatches(source, draft.preparation, seed=0)[Plan(epoch=0, indices=(0, 1, 2))]
    batch = host.to_draft_batch(source, CPU)
    result = TrainingStep(draft, engine)(batch)
    expected = gradients_of(result.total, draft)
    moved = copy.deepcopy(draft).to(device)
    there = moved_to(batch, torch.device(device))
    for dtype in (torch.float32, torch.bfloat16):
        moved.zero_grad(set_to_none=True)
        found = TrainingStep(moved, engine, compute_dtype=dtype)(there)
        exact = dtype == torch.float32
        torch.testing.assert_close(found.total.cpu(), result.total, rtol=SAME if exact else ROUNDED, atol=0)
        gradients = gradients_of(found.total, moved)
        assert gradients.keys() == expected.keys()
        one, other = (torch.cat([part.flatten().cpu() for part in all_.values()]) for all_ in (gradients, expected))
        assert all(value.dtype == torch.float32 for value in gradients.values())
        if exact:
            torch.testing.assert_close(one, other, rtol=SAME, atol=SAME * float(other.abs().max()))
        else:
            assert cosine(one, other) > ALIKE


@ALGORITHM
@ON
def test_decoding(
    tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel], algorithm: str, device: str
) -> None:
    """In fp32 greedy outputs are the CPU's, with and without a draft, in batches and alone."""
    target = tiny_target("qwen3")
    draft = tiny_draft(algorithm, target).eval()
    requests = [
        Request(id=str(number), prompt_ids=tuple(row.input_ids.tolist()), seed=number)
        for number, row in enumerate(samples())
    ]

    def outputs(device: str, *, drafted: bool, batch_size: int) -> dict[str, tuple[int, ...]]:
        model = load_target(target.adapter, target.where, dtype=torch.float32, device=device)
        proposer = copy.deepcopy(draft).to(device).proposer() if drafted else None
        found = decode(
            model, proposer, requests, sampling=Sampling(temperature=0.0), stop_ids=(), max_new_tokens=24,
            batch_size=batch_size, max_length=64,
        )  # fmt: skip
        return {one.id: tuple(one.output_ids) for one in found}

    expected = outputs("cpu", drafted=False, batch_size=1)
    for drafted in (False, True):
        for batch_size in (1, 3):
            assert outputs(device, drafted=drafted, batch_size=batch_size) == expected


def moved_to(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on the device."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    features = evolve(
        batch.features, hidden=moved(batch.features.hidden), last_hidden=moved(batch.features.last_hidden)
    )
    names = ("input_ids", "attention_mask", "loss_mask", "position_ids", "document_ids")
    return evolve(
        batch,
        features=features,
        prepared={name: moved(value) for name, value in batch.prepared.items()},
        **{name: moved(getattr(batch, name)) for name in names},
    )
