"""The grid of a batch's blocks, which attention runs over. Knows anchors; not the network.

Legend: B sequences, A most blocks in one sequence, N live blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.contracts.draft import PreparedSample
from deepspec_core.preparation.anchors import AnchorPreparation


@frozen(kw_only=True)
class GridPreparation(AnchorPreparation):
    """Blocks at drawn anchors, and where they stand in a grid with as many columns as the fullest sequence has."""

    def collate(self, prepared: Sequence[PreparedSample]) -> dict[str, Tensor]:
        """AnchorPreparation's blocks and rows, and the grid.

        `grid` [B, A]: which block is a sequence's j-th (0 where it has fewer); `grid_anchors` [B, A]: its anchor (0,
        that is no context, where it has fewer); `place` [N]: where in the flattened grid a block is.
        """
        batch = super().collate(prepared)
        anchors_N, sequence_N = batch["anchors"], batch["sequence"]
        sizes_B = torch.bincount(sequence_N, minlength=len(prepared))
        first_B = sizes_B.cumsum(0) - sizes_B
        rank_N = torch.arange(len(anchors_N)) - first_B[sequence_N]
        width = int(sizes_B.max())
        place_N = sequence_N * width + rank_N
        grid_BA = torch.zeros(len(prepared) * width, dtype=torch.long)
        grid_BA[place_N] = torch.arange(len(anchors_N))
        grid_anchors_BA = torch.zeros_like(grid_BA)
        grid_anchors_BA[place_N] = anchors_N
        return {
            **batch,
            "grid": grid_BA.view(len(prepared), width),
            "grid_anchors": grid_anchors_BA.view(len(prepared), width),
            "place": place_N,
        }
