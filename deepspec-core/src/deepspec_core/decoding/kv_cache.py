"""Keys and values of one attention layer, for many sequences at once.

Knows slots and positions. Does not know whose layer it is, or how long a sequence is: its readers must mask.

Legend: S slots, B slots in a call, G kv heads, L cache length, T new tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SlotKVCache"]


class SlotKVCache:
    """Keys and values [S, G, L + 1, D] of one layer.

    Padding (position -1) is written to the last entry, which is unused.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.max_length = max_length
        shape = (num_slots, num_kv_heads, max_length + 1, head_dim)
        # Zeros, not empty: masked positions are multiplied by probability 0, and 0 * inf would be NaN.
        self.keys_SGLD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_SGLD = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, slots_B: Tensor, positions_BT: Tensor, keys_BGTD: Tensor, values_BGTD: Tensor) -> None:
        """Write keys and values at positions of slots. Earlier entries there are replaced."""
        rows_B1 = slots_B[:, None]
        self.keys_SGLD[rows_B1, :, positions_BT] = keys_BGTD.transpose(1, 2).to(self.keys_SGLD.dtype)
        self.values_SGLD[rows_B1, :, positions_BT] = values_BGTD.transpose(1, 2).to(self.values_SGLD.dtype)

    def read(self, slots_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, length, D] of positions 0..length-1.

        Slots must ascend. Reading all slots gives a view.
        """
        if slots_B.numel() == self.num_slots:
            return self.keys_SGLD[:, :, :length], self.values_SGLD[:, :, :length]
        return self.keys_SGLD[slots_B, :, :length], self.values_SGLD[slots_B, :, :length]
