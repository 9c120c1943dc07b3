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
    where_R2 = torch.stack([sequence_R, position_R], dim=1)
    where_P2, index_R = torch.unique(where_R2, dim=0, return_inverse=True)
    return where_P2[:, 0], where_P2[:, 1], index_R
