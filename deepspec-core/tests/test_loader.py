"""Loaders: a micro-batch crosses processes in one piece of memory, reading ahead costs no order, waiting is counted."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepspec_core.errors import PluginError
from deepspec_core.preparation.positions import distinct_positions
from deepspec_core.testing.random_batches import ragged_samples
from deepspec_core.testing.tiny_draft import TinyDraft
from deepspec_core.training import sampler
from deepspec_core.training.host_batch import HostBatch, host_batch
from deepspec_core.training.loader import Plan, iterate
from deepspec_core.training.metrics import Clock
from deepspec_core.training.one_buffer import joined, split


def ragged_batch(row_sizes: tuple[int, ...] | None) -> HostBatch:
    preparation = TinyDraft().preparation
    prepared = [preparation.prepare(sample, np.random.default_rng(0)) for sample in ragged_samples()]
    return host_batch(prepared, preparation, row_sizes=row_sizes)


def tensors_of(batch: HostBatch) -> dict[str, Tensor]:
    return batch._tensors()


@pytest.mark.parametrize("row_sizes", [None, (3, 1), (1, 2, 1)])
def test_a_batch_that_was_sent_is_the_same_batch_in_one_piece_of_memory(row_sizes: tuple[int, ...] | None) -> None:
    batch = ragged_batch(row_sizes)
    sent: HostBatch = pickle.loads(pickle.dumps(batch))  # as loaders send it, but for how memory is shared
    assert tensors_of(sent).keys() == tensors_of(batch).keys()
    for name, tensor in tensors_of(batch).items():
        torch.testing.assert_close(tensors_of(sent)[name], tensor, rtol=0, atol=0)
    for one, other in zip(sent.samples, batch.samples, strict=True):
        assert (one.id, one.original_length) == (other.id, other.original_length)
        torch.testing.assert_close(one.input_ids, other.input_ids, rtol=0, atol=0)
        torch.testing.assert_close(one.loss_mask, other.loss_mask, rtol=0, atol=0)
    assert (sent.counts, sent.row_sizes) == (batch.counts, batch.row_sizes)
    pieces = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(sent).values()}
    pieces |= {tensor.untyped_storage().data_ptr() for one in sent.samples for tensor in (one.input_ids, one.loss_mask)}
    assert len(pieces) == 1, "each piece of memory costs a descriptor and a handshake"


def test_one_buffer_keeps_every_dtype_and_shape() -> None:
    given = {
        "empty": torch.zeros(0, 3, dtype=torch.int64),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bits": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16(),
        "eighth": torch.randn(7).to(torch.float8_e4m3fn),
        "turned": torch.arange(6).view(2, 3).T,
    }
    back = split(*joined(given))
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back[name].float(), tensor.float())


def test_reading_ahead_over_the_end_of_an_epoch_draws_each_order_once() -> None:
    drawn: list[int] = []

    def order(
        lengths: object, step_size: int, generator: torch.Generator
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        drawn.append(generator.initial_seed())
        return sampler.shuffled([1] * 9, step_size, generator)

    batches = sampler.GlobalBatches([1] * 9, global_batch_size=2, epochs=3, seed=10, order=order)
    straight = [batches.indices(step) for step in range(batches.total_steps)]
    assert drawn == [10, 11, 12]
    for step in range(batches.total_steps - 4):  # loaders are four steps ahead
        assert batches.indices(step + 4) == straight[step + 4]
        assert batches.indices(step) == straight[step]
    assert len(drawn) <= 6


def test_waiting_for_the_loader_is_counted_and_computing_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def loader() -> Iterator[int]:
        nonlocal now
        for number in range(2):
            now += 1.0
            yield number

    clock = Clock()
    for _ in clock.waiting(loader()):
        now += 3.0
    assert clock.rates()["loader_wait"] == 2 / 8
    now += 1.0
    assert clock.rates()["loader_wait"] == 0, "each line counts anew"


def test_distinct_positions_are_the_pairs_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    sequence_R, position_R = (torch.randint(most, (50,), generator=generator) for most in (4, 6))
    sequence_P, position_P, index_R = distinct_positions(sequence_R, position_R)
    pairs = list(zip(sequence_P.tolist(), position_P.tolist(), strict=True))
    assert pairs == sorted(set(zip(sequence_R.tolist(), position_R.tolist(), strict=True)))
    assert torch.equal(sequence_P[index_R], sequence_R)
    assert torch.equal(position_P[index_R], position_R)
    none = torch.zeros(0, dtype=torch.long)
    assert [len(part) for part in distinct_positions(none, none)] == [0, 0, 0]


class _Leaving:
    def prepare(self, sample: object, rng: object) -> object:
        raise SystemExit(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_preparation_that_calls_sys_exit_is_an_error_that_names_it(workers: int) -> None:
    plans: Any = [Plan(epoch=0, indices=(0,), row_sizes=None)]
    source: Any = ragged_samples()
    preparation: Any = _Leaving()
    with pytest.raises(PluginError, match=r"(?s)called sys.exit\(\).*test_loader"):
        next(iter(iterate(source, preparation, plans, seed=0, workers=workers)))
