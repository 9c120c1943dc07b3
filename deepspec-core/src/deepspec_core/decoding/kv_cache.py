"""Keys and values of one attention layer, for many sequences at once.

Knows slots and positions. Does not know whose layer it is, or how long a sequence is: its readers must mask. A layer
with a window needs only the latest positions: then entry e holds the latest written position p with p % size == e.

Legend: S slots, B slots in a call, G kv heads, L cache size, T new tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SlotKVCache"]


class SlotKVCache:
    """Keys and values [S, G, L + 1, D] of one layer.

    `keep`: how many positions of each slot are kept, the latest; None: all of max_length. `size` is L, the smaller of
    the two. Padding (position -1) is written to the last entry, which is unused.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        keep: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.max_length = max_length
        self.size = max_length if keep is None else min(keep, max_length)
        shape = (num_slots, num_kv_heads, self.size + 1, head_dim)
        # Zeros, not empty: masked positions are multiplied by probability 0, and 0 * inf would be NaN.
        self.keys_SGLD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_SGLD = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, slots_B: Tensor, positions_BT: Tensor, keys_BGTD: Tensor, values_BGTD: Tensor) -> None:
        """Write keys and values at positions of slots. Earlier entries there are replaced.

        One call may write no two positions of a slot that share an entry.
        """
        rows_B1 = slots_B[:, None]
        entries_BT = positions_BT
        if self.size < self.max_length:
            entries_BT = torch.where(positions_BT < 0, positions_BT, positions_BT % self.size)
        self.keys_SGLD[rows_B1, :, entries_BT] = keys_BGTD.transpose(1, 2).to(self.keys_SGLD.dtype)
        self.values_SGLD[rows_B1, :, entries_BT] = values_BGTD.transpose(1, 2).to(self.values_SGLD.dtype)

    def write_run(self, slot: int, start: int, keys_1GTD: Tensor, values_1GTD: Tensor) -> None:
        """Write one slot's keys and values at positions start, start + 1, ...: `write`, where the host knows them.

        Only where all positions are kept, so that entries are positions.
        """
        assert self.size == self.max_length, "entries of a window wrap around"
        for kept_SGLD, new_1GTD in ((self.keys_SGLD, keys_1GTD), (self.values_SGLD, values_1GTD)):
            kept_1GLD = kept_SGLD if self.num_slots == 1 else kept_SGLD.narrow(0, slot, 1)
            kept_1GLD.narrow(2, start, new_1GTD.shape[2]).copy_(new_1GTD)

    def move(self, slots_B: Tensor, from_BT: Tensor, to_BT: Tensor) -> None:
        """Copy entries from_BT of slots to entries to_BT, all read before any is written. -1 is the unused entry.

        Only where all positions are kept, so that entries are positions.
        """
        assert self.size == self.max_length, "entries of a window wrap around"
        rows_B1 = slots_B[:, None]
        for kept_SGLD in (self.keys_SGLD, self.values_SGLD):
            kept_SGLD[rows_B1, :, to_BT] = kept_SGLD[rows_B1, :, from_BT]

    def latest(self, slots_B: Tensor, lengths_B: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, min(longest, L), D] of each slot's latest positions, in their order.

        Column j of slots[b] is position j + max(0, lengths[b] - L); `longest` is the largest of `lengths`.
        """
        if longest <= self.size:
            return self.read(slots_B, longest)
        order_L = torch.arange(self.size, device=lengths_B.device)
        entries_BL = ((lengths_B - self.size).clamp(min=0)[:, None] + order_L) % self.size
        keys_BLGD, values_BLGD = (
            kept_SGLD[slots_B[:, None], :, entries_BL] for kept_SGLD in (self.keys_SGLD, self.values_SGLD)
        )
        return keys_BLGD.transpose(1, 2), values_BLGD.transpose(1, 2)

    def read(self, slots_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, length, D] of entries 0..length-1: of these positions, while length is at most L.

        Slots must ascend. Reading all slots gives a view.
        """
        if slots_B.numel() == self.num_slots:
            return self.keys_SGLD.narrow(2, 0, length), self.values_SGLD.narrow(2, 0, length)
        return self.keys_SGLD[slots_B, :, :length], self.values_SGLD[slots_B, :, :length]
