"""The distinct positions of a batch, for rows of which several are compared with the same one.

The target's logits are formed once a position (contracts.rows.Rows.target_hidden). Knows indices only.

Legend: R rows, P distinct positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["distinct_positions"]


def distinct_positions(sequence_R: Tensor, position_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair of sequence and position once, in increasing order: (sequence [P], position [P], index [R]).

    Row r is of pair index[r].
    """
    # One number a pair: sorting pairs takes several times as long, and loaders do it for every micro-batch.
    width = int(position_R.max()) + 1 if len(position_R) else 1
    where_P, index_R = torch.unique(sequence_R * width + position_R, return_inverse=True)
    return where_P // width, where_P % width, index_R
