"""Which samples make up each micro-batch of each step, on one rank, in order.

Knows steps, ranks, rows and indices. Does not know samples, nor who reads them.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen
from torch.utils.data import Sampler

from deepspec_core.training.packing import micro_batches, packed_rows
from deepspec_core.training.sampler import GlobalBatches


@frozen(kw_only=True)
class Plan:
    """The samples of one micro-batch. If `live` is false, its rank has no share of the step, and the batch counts 0.

    row_sizes: How many samples each row has, in order; None: each sample has a row, and nothing is packed.
    """

    epoch: int
    indices: tuple[int, ...]
    live: bool = True
    row_sizes: tuple[int, ...] | None = None


class StepPlans(Sampler[Plan]):
    """The plans of one rank's micro-batches from a step onwards, in order, each of at most `micro_batch_size` rows.

    row_tokens: A row holds samples of at most so many tokens together; None: each sample has a row.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        steps: range,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        row_tokens: int | None = None,
    ) -> None:
        self.batches, self.steps, self.row_tokens = batches, steps, row_tokens
        self.rank, self.world_size, self.micro_batch_size = rank, world_size, micro_batch_size

    def of_step(self, step: int) -> list[Plan]:
        """The plans of a step. There is at least one, because every rank takes part in the reduction of every step."""
        share = self.batches.share(step, rank=self.rank, world_size=self.world_size)
        live = bool(share)
        epoch, indices = self.batches.epoch(step), share or self.batches.indices(step)[:1]
        size, lengths = self.micro_batch_size, self.batches.lengths
        if self.row_tokens is None:
            cut = (indices[start : start + size] for start in range(0, len(indices), size))
            return [Plan(epoch=epoch, indices=tuple(part), live=live) for part in cut]
        return [
            Plan(
                epoch=epoch,
                indices=tuple(index for row in rows for index in row),
                live=live,
                row_sizes=tuple(map(len, rows)),
            )
            for rows in micro_batches(packed_rows(indices, lengths, self.row_tokens), lengths, size)
        ]

    def __iter__(self) -> Iterator[Plan]:
        for step in self.steps:
            yield from self.of_step(step)
