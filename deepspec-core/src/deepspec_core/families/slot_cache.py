"""A transformers Cache over core's slot caches, so that any transformers decoder can run incrementally on slots.

Knows transformers' one call, `update`, and cells, the places of tokens in a slot; knows neither masks nor the lengths
of sequences. A committed token is in the cell with the number of its position. New tokens follow in the order in which
they are fed, so the cells of a tree's tokens differ from their positions. A layer's cache is made when the layer first
writes, with the shape, dtype and device of the written tensor.

Legend: B slots in a call, G kv heads, T new tokens, D head size, L keys read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from deepspec_core.decoding.kv_cache import SlotKVCache


class SlotCache(Cache):  # type: ignore[misc]
    """One SlotKVCache a layer. `aim` says where the next forward writes and how far it reads."""

    def __init__(self, num_slots: int, max_length: int) -> None:
        super().__init__(layers=[])
        self.num_slots, self.max_length = num_slots, max_length
        self.by_layer: dict[int, SlotKVCache] = {}
        self.slots_B: Tensor
        self.cells_BT: Tensor
        self.length = 0
        self.run: tuple[int, int] | None = None

    def aim(self, slots_B: Tensor, cells_BT: Tensor, length: int) -> None:
        """The next forward is about these slots, writes to these cells (-1: nowhere) and reads 0..length-1."""
        self.slots_B, self.cells_BT, self.length = slots_B, cells_BT, length
        self.run = _run_of(slots_B, cells_BT)

    def move(self, slots_B: Tensor, from_BT: Tensor, to_BT: Tensor) -> None:
        """Copy what cells from_BT hold to cells to_BT, in every layer; -1: nothing."""
        for layer in self.by_layer.values():
            layer.move(slots_B, from_BT, to_BT)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values [B, G, T, D]; return what its queries attend to, [B, G, L, D] each."""
        layer = self.by_layer.get(layer_idx)
        if layer is None:
            layer = self.by_layer[layer_idx] = SlotKVCache(
                num_slots=self.num_slots,
                num_kv_heads=key_states.shape[1],
                head_dim=key_states.shape[-1],
                max_length=self.max_length,
                dtype=key_states.dtype,
                device=key_states.device,
            )
        if self.run is None:
            layer.write(self.slots_B, self.cells_BT, key_states, value_states)
        else:
            layer.write_run(*self.run, key_states, value_states)
        return layer.read(self.slots_B, self.length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys the current forward reads."""
        return self.length


def _run_of(slots_B: Tensor, cells_BT: Tensor) -> tuple[int, int] | None:
    """Slot and first cell of the new tokens of a sequence that is alone: a slice is written faster than an index.

    None with more sequences or padding, and where the host would have to wait for an accelerator.
    """
    if len(slots_B) > 1 or cells_BT.device.type != "cpu":
        return None
    cells = cells_BT[0].tolist()
    return None if cells[-1] < 0 else (int(slots_B), cells[0])
