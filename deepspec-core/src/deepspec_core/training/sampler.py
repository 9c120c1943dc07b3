"""Which samples make up which optimizer step, and each sample's random numbers.

Everything follows from (seed, epoch, step): not from ranks, micro-batches or workers, so any of them may change between
a checkpoint and its resumption. Knows indices and lengths; not samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


class GlobalBatches:
    """The epochs' permutations, cut into optimizer steps of `global_batch_size` sequences.

    Every epoch visits every sample once: its last step is smaller where the size does not divide their number. Weights
    are divided by the step's own denominator, so a smaller step is an unbiased, if noisier, one. Epoch e is
    torch.randperm seeded with seed + e.
    """

    def __init__(self, lengths: Sequence[int], *, global_batch_size: int, epochs: int, seed: int) -> None:
        assert len(lengths) > 0, "nothing to train on"
        self.lengths = lengths
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(lengths) // global_batch_size)
        self.total_steps = self.steps_per_epoch * epochs
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def epoch(self, step: int) -> int:
        """The epoch of a zero-based step."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """The samples of a zero-based step, longest first, so that micro-batches pad little."""
        epoch = self.epoch(step)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.lengths), generator=generator).numpy()
        start = (step % self.steps_per_epoch) * self.global_batch_size
        chosen = self._order[start : start + self.global_batch_size].tolist()
        return sorted(chosen, key=lambda index: (-self.lengths[index], index))

    def share(self, step: int, *, rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
        """A rank's micro-batches of a step; no list where the step has fewer samples than there are ranks."""
        own = self.indices(step)[rank::world_size]
        return [own[start : start + micro_batch_size] for start in range(0, len(own), micro_batch_size)]


def sample_rng(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """The generator a sample is prepared with in an epoch: the same in any batch, worker and rank."""
    digest = hashlib.sha256(f"{seed}\0{epoch}\0{sample_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
