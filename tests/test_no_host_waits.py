"""No micro-step waits for the device: nothing of draft, loss and backward reads back a number that is on it.

On a GPU torch itself says so (`set_sync_debug_mode`). Without one, the same step runs on the meta device, whose tensors
have no numbers: reading one, or an operation whose result's shape depends on one, raises there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from attrs import evolve
from test_packed_batches import ALONE, PACKED, PACKING, samples_of
from torch import Tensor

from deepspec_core.config.schema import LossOptions
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.rows.host_side import with_host_side
from deepspec_core.testing.random_batches import with_large_weights
from deepspec_core.training.host_batch import HostBatch
from deepspec_core.training.loader import MicroBatches, Plan
from deepspec_core.training.reduction import StepSums
from deepspec_core.training.step import TrainingStep

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = [(algorithm, {}) for algorithm in PACKING]
KINDS += [("dspark", {"vocab_size": 24}), ("eagle3", {"vocab_size": 24, "num_layers": 2, "num_anchors": 3})]


class Stored:
    """A cache's place: every batch brings its features."""

    features = None


def with_features(batch: HostBatch, source: OnlineFeatures) -> HostBatch:
    """As from a cache: features on the host."""
    given = batch.to_draft_batch(source, CPU).features
    return batch._with({**batch._tensors(), "hidden": given.hidden, "last_hidden": given.last_hidden})


def micro_step(
    step: TrainingStep, batch: HostBatch, sums: StepSums, device: torch.device, *, with_metrics: bool
) -> Tensor:
    """What the trainer does for each micro-batch, up to the sums that it reads once a step."""
    draft_batch = batch.to_draft_batch(Stored(), device)  # type: ignore[arg-type]
    result = step(draft_batch, step=0, with_metrics=with_metrics)
    result.total.backward()
    sums.add(result.denominator, result.metrics)
    total: Tensor = result.total.detach()
    return total


@pytest.fixture
def case(
    tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel], registry: Registry
) -> Callable[..., tuple[TrainingStep, HostBatch]]:
    def make(
        algorithm: str, options: dict[str, Any], plan: Plan, kernels: str = "plain"
    ) -> tuple[TrainingStep, HostBatch]:
        target = tiny_target("qwen3")
        draft = with_large_weights(tiny_draft(algorithm, target, **options))
        draft.adopt(target.model.embedding_weight(), target.model.head_weight())
        source = OnlineFeatures(samples_of(40), target.model, draft.describe().taps)
        host = with_features(MicroBatches(source, draft.preparation, seed=0)[plan], source)
        terms = {"ce": 0.1, "tv": 0.9} if algorithm != "eagle3" else {"soft_ce": 1.0}
        if algorithm == "dspark":
            terms |= {"confidence": 1.0}
        loss = LossOptions(terms=terms, kernels=kernels, chunk_rows=16)
        return TrainingStep(draft, build_engine(loss, registry)), host

    return make


@contextmanager
def no_autocast() -> Iterator[None]:
    """torch refuses autocast on the meta device, where it would change dtypes only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        yield


@pytest.mark.parametrize("plan", [ALONE, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize(("algorithm", "options"), KINDS, ids=str)
def test_no_micro_step_reads_a_number_of_the_device(
    case: Callable[..., tuple[TrainingStep, HostBatch]], algorithm: str, options: dict[str, Any], plan: Plan
) -> None:
    step, batch = case(algorithm, options, plan)
    numbers = [micro_step(step, batch, StepSums(CPU), CPU, with_metrics=metrics) for metrics in (False, True)]
    assert all(bool(total.isfinite()) and total != 0 for total in numbers)
    on_meta = step.to(META)
    if step.draft.vocabulary is not None:
        ids = step.draft.vocabulary.ids
        step.draft.vocabulary.target_head = step.draft.vocabulary.target_head.to(META)
        # Looked at in the first micro-step, when the host may wait.
        assert step.engine._are_new(ids)
    step.draft.zero_grad()
    with no_autocast():
        for with_metrics in (False, True):
            micro_step(on_meta, batch, StepSums(META), META, with_metrics=with_metrics)
    trained = [parameter for parameter in step.draft.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.device.type == "meta" for parameter in trained)


def test_the_meta_device_notices_who_reads(case: Callable[..., tuple[TrainingStep, HostBatch]]) -> None:
    step, batch = case("dflash", {}, ALONE)
    forward = step.draft.forward
    step.to(META)

    def forgetful(given: Any) -> Any:
        rows = forward(given)
        return evolve(rows, on_host=())

    step.draft.forward = forgetful  # type: ignore[method-assign]
    with no_autocast(), pytest.raises((NotImplementedError, RuntimeError)):
        micro_step(step, batch, StepSums(META), META, with_metrics=False)


def test_what_the_host_is_told_is_what_the_device_has(case: Callable[..., tuple[TrainingStep, HostBatch]]) -> None:
    for algorithm, options in KINDS:
        step, batch = case(algorithm, options, PACKED)
        rows = step.draft(batch.to_draft_batch(Stored(), CPU))  # type: ignore[arg-type]
        copies = {id(of): copy for of, copy in rows.on_host}
        for own, _ in with_host_side(rows).on_host:
            assert torch.equal(copies[id(own)], own), "the host knows all of it, and reads nothing back"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plan", [ALONE, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize(("algorithm", "options"), KINDS, ids=str)
def test_no_micro_step_waits_for_the_gpu(
    case: Callable[..., tuple[TrainingStep, HostBatch]], algorithm: str, options: dict[str, Any], plan: Plan
) -> None:
    device = torch.device("cuda")
    step, batch = case(algorithm, options, plan, "auto")
    step.to(device)
    if step.draft.vocabulary is not None:
        step.draft.vocabulary.target_head = step.draft.vocabulary.target_head.to(device)
    batch = batch.pin_memory()
    for with_metrics in (False, True):  # compiles, and fills caches of memory
        micro_step(step, batch, StepSums(device), device, with_metrics=with_metrics)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for with_metrics in (False, True):
            total = micro_step(step, batch, StepSums(device), device, with_metrics=with_metrics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(total.isfinite())
