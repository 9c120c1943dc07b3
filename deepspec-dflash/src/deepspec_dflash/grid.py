"""The grid of a batch's blocks, which attention runs over. Knows anchors; not the network.

Legend: B rows of a batch, A most blocks in one row, N live blocks.
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
    """Blocks at drawn anchors, and where they stand in a grid with as many columns as the fullest row has blocks."""

    def collate(self, prepared: Sequence[PreparedSample]) -> dict[str, Tensor]:
        """AnchorPreparation's blocks and rows, and the grid.

        `grid` [B, A]: which block is a row's j-th (0 where it has fewer); `grid_anchors` [B, A]: its anchor's column
        (0, that is no context, where it has fewer); `place` [N]: where in the flattened grid a block is. If samples are
        packed there is `grid_begins` [B, A]: the column in which the block's conversation begins.
        """
        batch = super().collate(prepared)
        anchors_N, sequence_N = batch["anchors"], batch["sequence"]
        last = prepared[-1].row
        num_rows = len(prepared) if last is None else last + 1
        sizes_B = torch.bincount(sequence_N, minlength=num_rows)
        first_B = sizes_B.cumsum(0) - sizes_B
        rank_N = torch.arange(len(anchors_N)) - first_B[sequence_N]
        width = int(sizes_B.max())
        place_N = sequence_N * width + rank_N

        def grid(of_blocks_N: Tensor) -> Tensor:
            laid_BA = torch.zeros(num_rows * width, dtype=torch.long)
            laid_BA[place_N] = of_blocks_N
            return laid_BA.view(num_rows, width)

        return {
            **batch,
            "grid": grid(torch.arange(len(anchors_N))),
            "grid_anchors": grid(anchors_N),
            "place": place_N,
            **({"grid_begins": grid(batch["begins"])} if "begins" in batch else {}),
        }
