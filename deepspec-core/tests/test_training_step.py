"""TrainingStep, host batches and loading: one module from batch to sums; padding and workers change nothing."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from attrs import evolve

from deepspec_core.contracts.draft import DraftBatch
from deepspec_core.contracts.rows import Rows
from deepspec_core.errors import PluginError
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.terms import CrossEntropy, TotalVariation
from deepspec_core.rows.weightings import Uniform
from deepspec_core.testing.tiny_draft import TinyDraft, TinySource
from deepspec_core.training.constant_buffers import ConstantBuffers
from deepspec_core.training.host_batch import HostBatch
from deepspec_core.training.loader import MicroBatches, Plan, StepPlans, iterate
from deepspec_core.training.sampler import GlobalBatches
from deepspec_core.training.step import TrainingStep

CPU = torch.device("cpu")


def engine() -> RowEngine:
    return RowEngine({"ce": (CrossEntropy(), 0.5), "tv": (TotalVariation(), 1.0)}, Uniform())


def host(source: TinySource, *indices: int) -> HostBatch:
    return MicroBatches(source, TinyDraft().preparation, seed=0)[Plan(epoch=0, indices=indices)]


@pytest.mark.parametrize("stored", [True, False])
def test_a_batch_sums_its_samples(stored: bool) -> None:
    source = TinySource(6, stored=stored)
    step = TrainingStep(TinyDraft(rank=2), engine())
    together = step(host(source, 0, 1, 2, 3).to_draft_batch(source, CPU))
    alone = [step(host(source, index).to_draft_batch(source, CPU)) for index in range(4)]
    torch.testing.assert_close(together.total, sum(one.total for one in alone))
    torch.testing.assert_close(together.denominator, sum(one.denominator for one in alone))


def test_gradients_reach_every_trained_parameter_and_no_frozen_one() -> None:
    source = TinySource(4)
    draft = TinyDraft(rank=2)
    TrainingStep(draft, engine())(host(source, 0, 1, 2, 3).to_draft_batch(source, CPU)).total.backward()
    reached = {name for name, parameter in draft.named_parameters() if parameter.grad is not None}
    assert reached == {"project.weight", "project.bias", "slots", "before.weight", "after.weight"}


class Counting(TinyDraft):
    """A draft whose forward pass changes a buffer."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()), persistent=persistent)

    def forward(self, batch: DraftBatch) -> Rows:
        self.passes += 1
        return super().forward(batch)


class Detached(TinyDraft):
    """A draft whose rows depend on none of its weights."""

    def forward(self, batch: DraftBatch) -> Rows:
        return evolve(super().forward(batch), hidden=torch.zeros_like(super().forward(batch).hidden))


def test_the_first_pass_shows_that_a_draft_changes_its_buffers() -> None:
    source = TinySource(4)
    batch = host(source, 0, 1).to_draft_batch(source, CPU)
    with pytest.raises(PluginError, match="buffers must not change") as error:
        TrainingStep(Counting(persistent=True), engine(), checks=True)(batch)
    assert "passes" in str(error.value)
    assert "Counting" in str(error.value)
    TrainingStep(Counting(persistent=False), engine(), checks=True)(batch)
    TrainingStep(TinyDraft(), engine(), checks=True)(batch)


def test_the_first_pass_shows_that_a_draft_trains_nothing() -> None:
    source = TinySource(4)
    step = TrainingStep(Detached(), engine(), checks=True)
    with pytest.raises(PluginError, match="depend on nothing that is trained"):
        step(host(source, 0, 1).to_draft_batch(source, CPU))


def test_a_buffer_that_changed_later_is_noticed_before_it_is_saved() -> None:
    draft = Counting(persistent=True)
    buffers = ConstantBuffers(draft)
    buffers.check()
    draft.passes += 1
    with pytest.raises(PluginError, match="passes"):
        buffers.check()


def test_bf16_compute_keeps_fp32_gradients_and_sums() -> None:
    source = TinySource(4)
    batch = host(source, 0, 1, 2, 3).to_draft_batch(source, CPU)
    exact = TrainingStep(TinyDraft(), engine())(batch)
    draft = TinyDraft()
    rounded = TrainingStep(draft, engine(), compute_dtype=torch.bfloat16)(batch)
    rounded.total.backward()
    assert rounded.total.dtype == torch.float32
    assert rounded.total != exact.total
    torch.testing.assert_close(rounded.total, exact.total, rtol=1e-2, atol=1e-2)
    assert draft.project.weight.grad is not None
    assert draft.project.weight.grad.dtype == torch.float32


def test_host_batches_pad_and_count() -> None:
    source = TinySource(5)
    batch = host(source, 0, 3, 4)
    lengths = [source.lengths()[index] for index in (0, 3, 4)]
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.loss_mask.shape == (3, max(lengths))
    assert batch.attention_mask.sum(1).tolist() == lengths
    assert not batch.loss_mask[~batch.attention_mask].any()
    assert not batch.input_ids[~batch.attention_mask].any()
    assert batch.features is not None
    assert batch.features.hidden.shape == (3, max(lengths), 32)
    assert all(sample.features is None for sample in batch.samples)
    assert batch.counts["samples"] == 3
    assert host(TinySource(5, stored=False), 0, 1).features is None


def test_workers_change_nothing() -> None:
    source = TinySource(9)
    batches = GlobalBatches(source.lengths(), global_batch_size=4, epochs=2, seed=3)
    plans = StepPlans(batches, range(1, 6), rank=0, world_size=1, micro_batch_size=2)
    preparation = TinyDraft().preparation
    alone = list(iterate(source, preparation, plans, seed=3, workers=0))
    with_workers = list(islice(iterate(source, preparation, plans, seed=3, workers=2), len(alone) + 1))
    assert len(with_workers) == len(alone)
    for one, other in zip(alone, with_workers, strict=True):
        assert [sample.id for sample in one.samples] == [sample.id for sample in other.samples]
        torch.testing.assert_close(one.prepared["anchors"], other.prepared["anchors"])
        assert one.features is not None
        assert other.features is not None
        torch.testing.assert_close(one.features.hidden, other.features.hidden, rtol=0, atol=0)


def test_a_rank_without_a_share_still_takes_part() -> None:
    batches = GlobalBatches([5] * 5, global_batch_size=4, epochs=1, seed=0)
    plans = [StepPlans(batches, range(2), rank=rank, world_size=2, micro_batch_size=4) for rank in range(2)]
    assert [plan.live for plan in plans[0]] == [True, True]
    assert [plan.live for plan in plans[1]] == [True, False]
