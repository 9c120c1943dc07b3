"""Core's weightings: how the rows of a block weigh against each other. Knows slots; not losses nor reduction.

Legend: N rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec_core.config.weighting_options import DecayOptions
from deepspec_core.contracts.loss import RowStats


class Uniform:
    """Every row weighs 1."""

    def __call__(self, slot: Tensor, block: Tensor, stats: RowStats) -> Tensor:
        return torch.ones_like(slot, dtype=torch.float32)


class Decay:
    """exp(-slot / gamma): early slots weigh more, because a late one only counts when all before it were accepted."""

    def __init__(self, options: DecayOptions) -> None:
        self.gamma = options.gamma

    def __call__(self, slot: Tensor, block: Tensor, stats: RowStats) -> Tensor:
        return torch.exp(slot.to(torch.float32) / -self.gamma)
