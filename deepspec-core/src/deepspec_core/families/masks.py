"""Attention masks of a target's layers, built once a call and shared by all of them.

Masks are additive: 0 = may attend, -inf = may not. Attention kernels would convert boolean masks to these in every
layer. None stands for plain causal attention, which kernels compute fastest without a mask. Knows layer types as
transformers configs name them (full and sliding attention); knows neither caches nor models.

Legend: B sequences, T query positions, L key positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FULL, SLIDING = "full_attention", "sliding_attention"

# What decoders take as attention_mask: one mask by layer type, or, where all layers are alike, one for all.
LayerMasks = dict[str, Tensor | None] | Tensor | None


class MaskBuilder:
    """Masks for the layer types of one text config.

    A query may see keys at or before its own position and, in sliding layers, fewer than `sliding_window` before it.
    In a tree it sees its ancestors instead of all before it; the window is the same.
    """

    def __init__(self, text: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        layer_types = getattr(text, "layer_types", None)
        self.by_type = layer_types is not None
        self.types = frozenset(layer_types or ())
        self.window: int | None = None
        if SLIDING in self.types or not self.by_type:
            self.window = getattr(text, "sliding_window", None)

    @staticmethod
    def unknown_types(text: Any) -> frozenset[str]:
        """Layer types of a config that no mask here describes."""
        return frozenset(getattr(text, "layer_types", None) or ()) - {FULL, SLIDING}

    def sequences(self, length: int, documents_BT: Tensor | None, device: torch.device) -> LayerMasks:
        """Right-padded sequences attending causally, within their document where documents are given."""
        if documents_BT is None and (self.window is None or length <= self.window):
            return self._pack(None, None)
        index_T = torch.arange(length, device=device)
        offset_BTT = (index_T[:, None] - index_T)[None]
        visible_BTT = offset_BTT >= 0
        if documents_BT is not None:
            visible_BTT = visible_BTT & (documents_BT[:, :, None] == documents_BT[:, None, :])
        full = None if documents_BT is None else self._additive(visible_BTT)
        return self._pack(full, self._windowed(visible_BTT, offset_BTT))

    def incremental(self, positions_BT: Tensor, keys_L: Tensor) -> LayerMasks:
        """New tokens at `positions_BT` (-1 = padding) over cached keys, which stand at positions `keys_L` = 0..L-1.

        Padding sees position 0, so that no row of the softmax is empty.
        """
        if self._all_seen(positions_BT, len(keys_L)):
            return self._pack(None, None)
        offset_BTL = positions_BT.clamp(min=0)[:, :, None] - keys_L
        visible_BTL = offset_BTL >= 0
        return self._pack(self._additive(visible_BTL), self._windowed(visible_BTL, offset_BTL))

    def branching(self, positions_BT: Tensor, cells_BT: Tensor, sees_BTT: Tensor, keys_L: Tensor) -> LayerMasks:
        """New tokens of a tree over cached keys in cells `keys_L` = 0..L-1.

        The new ones stand in cells_BT (-1 = padding), right behind the committed text, whose cells are its positions.
        `sees` is as in TargetModel.decode. Padding sees cell 0.
        """
        width = cells_BT.shape[1]
        column_BL = keys_L - cells_BT[:, :1]
        new_BL = (column_BL >= 0) & (column_BL < width)
        among_BL = column_BL.clamp(0, width - 1)
        positions_BL = torch.where(new_BL, positions_BT.gather(1, among_BL), keys_L)
        offset_BTL = positions_BT.clamp(min=0)[:, :, None] - positions_BL[:, None]
        seen_BTL = sees_BTT.gather(2, among_BL[:, None].expand(-1, width, -1)) & new_BL[:, None]
        visible_BTL = seen_BTL | (column_BL < 0)[:, None] | ((cells_BT < 0)[:, :, None] & (keys_L == 0))
        return self._pack(self._additive(visible_BTL), self._windowed(visible_BTL, offset_BTL))

    def _all_seen(self, positions_BT: Tensor, keys: int) -> bool:
        """Whether one new token a sequence stands at the last key of all, as where a sequence is decoded plainly alone.

        Known where reading a tensor is free: an accelerator would have to be waited for.
        """
        if positions_BT.shape[1] != 1 or positions_BT.device.type != "cpu":
            return False
        return (self.window is None or keys <= self.window) and bool((positions_BT == keys - 1).all())

    def _windowed(self, visible_BTL: Tensor, offset_BTL: Tensor) -> Tensor | None:
        return None if self.window is None else self._additive(visible_BTL & (offset_BTL < self.window))

    def _additive(self, visible_BTL: Tensor) -> Tensor:
        mask_BTL = torch.zeros(visible_BTL.shape, dtype=self.dtype, device=visible_BTL.device)
        return mask_BTL.masked_fill_(~visible_BTL, float("-inf"))[:, None]

    def _pack(self, full: Tensor | None, sliding: Tensor | None) -> LayerMasks:
        if self.by_type:
            return {name: sliding if name == SLIDING else full for name in self.types}
        return full if self.window is None else sliding
