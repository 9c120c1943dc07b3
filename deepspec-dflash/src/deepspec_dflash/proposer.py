"""Decoding: one backbone pass proposes a whole block for every slot.

Owns the draft's keys and values of verified context, one cache a layer; a block's own are dropped after its round. With
a window, a cache keeps no more positions than a block sees.
Knows neither the target nor verification.

Legend: S slots, B slots in a call, N blocks, T tokens, C = taps * H, H hidden size, K predictions of a block,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.kv_cache import SlotKVCache
from deepspec_core.decoding.sampling import draw_tokens
from deepspec_dflash.attention import BlockLayout, KeysValues
from deepspec_dflash.backbone import DFlashBackbone
from deepspec_dflash.options import DFlashOptions

__all__ = ["BlockDraft", "DFlashProposer"]


class BlockDraft(Protocol):
    """What proposing needs of a draft: its backbone, blocks through it, and logits of their outputs."""

    taps: tuple[int, ...]
    backbone: DFlashBackbone
    window: int | None

    @property
    def options(self) -> DFlashOptions: ...

    def run_blocks(
        self, anchor_ids_N: Tensor, anchors_N: Tensor, context: Sequence[KeysValues], layout: BlockLayout
    ) -> Tensor:
        """Outputs at the slots that predict, [N, K, H]."""
        ...

    def logits(self, hidden_H: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        ...


class DFlashProposer:
    """A contracts.proposer.Proposer. Drafts with a sequential head subclass it and replace `tokens`."""

    def __init__(self, model: BlockDraft) -> None:
        self.model = model
        self.max_tokens = model.options.num_predictions
        self.taps = model.taps
        self._caches: list[SlotKVCache] = []
        self._lengths_S = torch.zeros(0, dtype=torch.long)
        self._last_S = torch.zeros(0, dtype=torch.long)

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Fresh caches for num_slots sequences of at most max_length tokens."""
        weight, backbone = self.model.backbone.fc.weight, self.model.backbone
        self._caches = []
        for layer in backbone.draft_layers():
            cache = SlotKVCache(
                num_slots=num_slots,
                num_kv_heads=layer.attention.num_kv_heads,
                head_dim=layer.attention.head_dim,
                max_length=max_length,
                keep=self.model.window,
                dtype=weight.dtype,
                device=weight.device,
            )
            self._caches.append(cache)
        self._lengths_S = torch.zeros(num_slots, dtype=torch.long, device=weight.device)
        self._last_S = torch.zeros(num_slots, dtype=torch.long, device=weight.device)

    @torch.no_grad()
    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """The prompt's features become context; the first token is the next anchor."""
        self._lengths_S[slots] = 0
        self._extend(slots, features, lengths)
        self._last_S[slots] = first_token

    @torch.no_grad()
    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """A block for every slot, cut to its limit. Stop tokens are left to verification: later slots cost nothing."""
        last_B, lengths_B = self._last_S[slots], self._lengths_S[slots]
        longest, window = int(lengths_B.max()), self.model.window
        context = [cache.latest(slots, lengths_B, longest) for cache in self._caches]
        # A window is the same wherever positions are counted from: here, from the first that the cache still has.
        anchors_B = lengths_B if window is None else lengths_B.clamp(max=window)
        layout = BlockLayout.one_each(anchors_B, self.model.options.block_size, window)
        output_BKH = self.model.run_blocks(last_B, lengths_B, context, layout)
        return self.tokens(output_BKH, last_B, limits, sampling, uniforms)

    def tokens(
        self, hidden_BKH: Tensor, last_B: Tensor, limits_B: Tensor, sampling: Sampling, uniforms_BK: Tensor
    ) -> Proposal:
        """Every slot's token from its own output, all at once; `last_B` is the anchor token, for heads that want it."""
        logits_BKV = self.model.logits(hidden_BKH)
        lengths_B = limits_B.clamp(max=self.max_tokens)
        drawn_BK, probs_BKV = draw_tokens(logits_BKV, sampling, uniforms_BK)
        return Proposal(tokens=drawn_BK, lengths=lengths_B, probabilities=probs_BKV)

    @torch.no_grad()
    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """The verified tokens' features become context; the last committed token is the next anchor."""
        self._extend(slots, features, committed)
        self._last_S[slots] = committed_ids.gather(1, committed[:, None] - 1)[:, 0]

    def free(self, slots: Tensor) -> None:
        """Forget these slots."""
        self._lengths_S[slots] = 0

    def _extend(self, slots_B: Tensor, features_BTC: Tensor, counts_B: Tensor) -> None:
        """Append the first counts[b] features of slots[b] to its context."""
        offsets_BT = torch.arange(features_BTC.shape[1], device=counts_B.device).expand(len(counts_B), -1)
        positions_BT = self._lengths_S[slots_B, None] + offsets_BT
        backbone = self.model.backbone
        keys_values = backbone.context_keys_values(backbone.context(features_BTC), positions_BT)
        written_BT = offsets_BT < counts_B[:, None]
        if self.model.window is not None:
            written_BT = written_BT & (offsets_BT >= counts_B[:, None] - self.model.window)
        where_BT = torch.where(written_BT, positions_BT, -1)
        for cache, (keys_BGTD, values_BGTD) in zip(self._caches, keys_values, strict=True):
            cache.write(slots_B, where_BT, keys_BGTD, values_BGTD)
        self._lengths_S[slots_B] += counts_B
