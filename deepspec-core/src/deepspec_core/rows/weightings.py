"""Core's weightings: how much each row of a block counts. Knows slots and statistics of rows. Does not know losses or
reduction.

Legend: N rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepspec_core.contracts.loss import RowStats
from deepspec_core.rows.weighting_options import DecayOptions, DPaceOptions


class Uniform:
    """Every row weighs 1."""

    def __call__(self, slot: Tensor, block: Tensor, stats: RowStats) -> Tensor:
        return torch.ones_like(slot, dtype=torch.float32)


class Decay:
    """exp(-slot / gamma). Early slots weigh more, because a late one matters only if all before it are accepted."""

    def __init__(self, options: DecayOptions) -> None:
        self.gamma = options.gamma

    def __call__(self, slot: Tensor, block: Tensor, stats: RowStats) -> Tensor:
        return torch.exp(slot.to(torch.float32) / -self.gamma)


class DPace:
    """D-PACE (arXiv 2605.18810). A row weighs what it can add to the accepted length that the draft itself expects.

    w_j = sum_{m >= j} prod_{i <= m} s_i over the rows of a block, with s_i = (1 - alpha) * q_i + alpha and q_i the
    draft's probability of row i's label, in the dtype of statistics. w_j is the derivative of that length, w_0, in
    log s_j.

    The size of the weights is part of the published objective: its author asks for a division by the number of blocks,
    not by the sum of the weights (github.com/sgl-project/SpecForge/issues/828). The engine divides by that sum, unless
    rows state their own denominator. So the ratios between rows are as published, but a step counts the same whatever
    length the draft expects.
    """

    def __init__(self, options: DPaceOptions) -> None:
        self.alpha = options.alpha

    def __call__(self, slot: Tensor, block: Tensor, stats: RowStats) -> Tensor:
        smoothed_N = (1.0 - self.alpha) * torch.exp(-stats.ce.detach()) + self.alpha
        reached_N = _scan(torch.mul, smoothed_N, block)
        return _scan(torch.add, reached_N.flip(0), block.flip(0)).flip(0)


def _scan(combine: Callable[[Tensor, Tensor], Tensor], values_N: Tensor, block_N: Tensor) -> Tensor:
    """Cumulative products or sums within each block, by doubling.

    It does not wait for the device. A row's result depends on its own block only, bit for bit.
    """
    distance = 1
    while distance < len(values_N):
        later_n, earlier_n = values_N[distance:], values_N[:-distance]
        same_n = block_N[distance:] == block_N[:-distance]
        values_N = torch.cat([values_N[:distance], torch.where(same_n, combine(later_n, earlier_n), later_n)])
        distance *= 2
    return values_N
