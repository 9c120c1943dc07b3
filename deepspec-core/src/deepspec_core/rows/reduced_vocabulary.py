"""A draft's vocabulary that is smaller than the target's: which token each column of the draft's logits stands for.

Knows ids of tokens and of columns. Does not know logits or losses.

Legend: N any number of ids, D columns of the draft's logits, V the target's vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ReducedVocabulary:
    """Maps columns of the draft's logits to tokens of the target and back."""

    def __init__(self, ids_D: Tensor, size: int) -> None:
        """`ids_D` increase. `size` is that of the target's vocabulary."""
        self.ids_D = ids_D
        columns_D = torch.arange(len(ids_D), device=ids_D.device)
        self._columns_V = columns_D.new_full((size,), -1).scatter_(0, ids_D, columns_D)

    def tokens(self, columns_N: Tensor) -> Tensor:
        """The token of each column."""
        return self.ids_D[columns_N]

    def columns(self, tokens_N: Tensor) -> Tensor:
        """The column of each token; -1 for one that the draft does not know."""
        return self._columns_V[tokens_N]
