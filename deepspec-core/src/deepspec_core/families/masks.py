"""Attention masks of a target's layers, built once a call and shared by all of them.

Masks are additive, 0 = may attend and -inf = may not: attention kernels would turn boolean ones into these, layer by
layer. Knows layer types as transformers configs name them (full and sliding attention);
not caches, not models. None stands for "plain causal", which attention kernels do fastest without a mask.

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
        offset_BTL = positions_BT.clamp(min=0)[:, :, None] - keys_L
        visible_BTL = offset_BTL >= 0
        return self._pack(self._additive(visible_BTL), self._windowed(visible_BTL, offset_BTL))

    def _windowed(self, visible_BTL: Tensor, offset_BTL: Tensor) -> Tensor | None:
        return None if self.window is None else self._additive(visible_BTL & (offset_BTL < self.window))

    def _additive(self, visible_BTL: Tensor) -> Tensor:
        mask_BTL = torch.zeros(visible_BTL.shape, dtype=self.dtype, device=visible_BTL.device)
        return mask_BTL.masked_fill_(~visible_BTL, float("-inf"))[:, None]

    def _pack(self, full: Tensor | None, sliding: Tensor | None) -> LayerMasks:
        if self.by_type:
            return {name: sliding if name == SLIDING else full for name in self.types}
        return full if self.window is None else sliding
