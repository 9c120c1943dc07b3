"""Which samples belong to which optimizer step, and each sample's random numbers.

Both follow from the seed, the epoch and the step (or the sample's id). Ranks, micro-batches and workers do not matter,
so their numbers may change when a run resumes. Knows indices, lengths and orders. Does not know samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deepspec_core.training.epoch_order import Order, shuffled


class GlobalBatches:
    """The samples of every optimizer step. Each epoch is a permutation, cut into steps of `global_batch_size`
    sequences.

    Every epoch visits every sample once. Its last step is smaller if the number of samples is not a multiple of the
    batch size. A step is divided by its own denominator, so the gradient of a smaller step is noisier but not biased.
    The permutation of epoch e is drawn by `order` from a generator seeded with seed + e.
    """

    def __init__(
        self, lengths: Sequence[int], *, global_batch_size: int, epochs: int, seed: int, order: Order = shuffled
    ) -> None:
        assert len(lengths) > 0, "nothing to train on"
        self.lengths = lengths
        self.order = order
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(lengths) // global_batch_size)
        self.total_steps = self.steps_per_epoch * epochs
        self._orders: dict[int, np.ndarray[Any, Any]] = {}

    def epoch(self, step: int) -> int:
        """The epoch of a zero-based step."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """The samples of a zero-based step, longest first, so that micro-batches pad little."""
        epoch = self.epoch(step)
        order = self._orders.get(epoch)
        if order is None:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = self.order(self.lengths, self.global_batch_size, generator)
            # Loaders read ahead, so at the end of an epoch they ask for the next one's order while steps ask for this
            # one's. They may do so in another thread: what is kept is replaced in one go, and only saves time.
            self._orders = {kept: other for kept, other in self._orders.items() if abs(kept - epoch) == 1}
            self._orders = {**self._orders, epoch: order}
        start = (step % self.steps_per_epoch) * self.global_batch_size
        chosen = order[start : start + self.global_batch_size].tolist()
        return sorted(chosen, key=lambda index: (-self.lengths[index], index))

    def share(self, step: int, *, rank: int, world_size: int) -> list[int]:
        """A rank's samples of a step, longest first. Some ranks have none if the step has fewer samples than ranks."""
        return self.indices(step)[rank::world_size]


def sample_rng(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """The random generator for preparing a sample in an epoch. It does not depend on batch, worker or rank."""
    digest = hashlib.sha256(f"{seed}\0{epoch}\0{sample_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
