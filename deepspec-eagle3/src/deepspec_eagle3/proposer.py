"""Decoding: one token a step, each fed back with the output it was drawn from.

Owns the draft's keys and values, one cache a layer. Verified tokens stand in it with the target's own features, as in
the first step of training; what a proposal added is overwritten when its round is over. With a window, a cache keeps
what the next tokens can see and no more. Knows neither the target nor verification.

Legend: S slots, B slots in a call, T tokens, L cache entries, C = taps * H, H hidden size, K proposed tokens,
V vocabulary, h query heads, G kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.kv_cache import SlotKVCache
from deepspec_core.decoding.sampling import next_token
from deepspec_eagle3.drafter import Eagle3Drafter
from deepspec_eagle3.options import Eagle3Options

# With a window, so many tokens of a prompt at a time: a cache has room for them beside what they see.
_PIECE = 256


class StepDraft(Protocol):
    """What proposing needs of a draft: the network of one step, the embedding, and logits of normed outputs."""

    options: Eagle3Options
    taps: tuple[int, ...]
    embed_tokens: nn.Module
    drafter: Eagle3Drafter
    window: int | None

    def logits(self, hidden_H: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        ...


class Eagle3Proposer:
    """A contracts.proposer.Proposer. Any number of layers: a layer's cache holds what training's attention sees."""

    def __init__(self, model: StepDraft) -> None:
        self.model = model
        self.max_tokens = model.options.ttt_length
        self.taps = model.taps
        self._caches: list[SlotKVCache] = []
        self._lengths_S = torch.zeros(0, dtype=torch.long)
        self._hidden_SH = torch.zeros(0, 0)
        self._piece = 0

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Fresh caches for num_slots sequences of at most max_length tokens."""
        drafter, window = self.model.drafter, self.model.window
        weight = drafter.fc.weight
        self._piece = max_length if window is None else max(_PIECE, self.max_tokens + 1)
        self._caches = [
            SlotKVCache(
                num_slots=num_slots,
                num_kv_heads=layer.attention.num_kv_heads,
                head_dim=layer.attention.head_dim,
                max_length=max_length,
                keep=None if window is None else window + self._piece,
                dtype=weight.dtype,
                device=weight.device,
            )
            for layer in drafter.draft_layers()
        ]
        self._lengths_S = torch.zeros(num_slots, dtype=torch.long, device=weight.device)
        self._hidden_SH = torch.zeros(num_slots, weight.shape[0], dtype=weight.dtype, device=weight.device)

    @torch.no_grad()
    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """Pairs (features of position i, token i + 1) over the prompt and the first token."""
        self._lengths_S[slots] = 0
        next_ids_BT = F.pad(prompt_ids[:, 1:], (0, 1)).scatter(1, lengths[:, None] - 1, first_token[:, None])
        self._extend(slots, next_ids_BT, features, lengths)

    @torch.no_grad()
    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """Token by token, until a slot's limit or a stop token; the stop token is proposed, nothing after it."""
        drafter = self.model.drafter
        hidden_BH, begin_B = self._hidden_SH[slots], self._lengths_S[slots]
        num_tokens = min(self.max_tokens, int(limits.max()))
        longest = int(begin_B.max())
        proposing_B = torch.ones_like(limits, dtype=torch.bool)
        lengths_B = torch.zeros_like(limits)
        tokens: list[Tensor] = []
        probabilities: list[Tensor] = []
        for step in range(num_tokens):
            if step:
                hidden_B1H = self._step(
                    slots,
                    hidden_BH[:, None],
                    tokens[-1][:, None],
                    (begin_B + step - 1)[:, None],
                    write=proposing_B[:, None],
                    read=longest + step,
                )
                hidden_BH = hidden_B1H[:, 0]
            logits_BV = self.model.logits(drafter.norm(hidden_BH))
            token_B, q_BV = next_token(logits_BV, sampling, uniforms[:, step])
            sampling = sampling.after(token_B)
            tokens.append(token_B)
            probabilities += [] if q_BV is None else [q_BV]
            proposing_B = proposing_B & (step < limits)
            lengths_B = lengths_B + proposing_B
            for stop_id in stop_ids:
                proposing_B = proposing_B & (tokens[-1] != stop_id)
        return Proposal(
            tokens=torch.stack(tokens, dim=1) if tokens else limits.new_zeros(len(limits), 0),
            lengths=lengths_B,
            probabilities=torch.stack(probabilities, dim=1) if probabilities else None,
        )

    @torch.no_grad()
    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """Committed tokens, each with the target's features of the position before it, replace the proposal's."""
        self._extend(slots, committed_ids, features, committed)

    def free(self, slots: Tensor) -> None:
        """Forget these slots."""
        self._lengths_S[slots] = 0

    def _extend(self, slots_B: Tensor, next_ids_BT: Tensor, features_BTC: Tensor, counts_B: Tensor) -> None:
        """Append the first counts[b] pairs to slots[b], and keep the last one's output."""
        offsets_T = torch.arange(next_ids_BT.shape[1], device=counts_B.device)
        begin_B = self._lengths_S[slots_B]
        read = int((begin_B + counts_B).max())
        outputs = [
            self._step(
                slots_B,
                self.model.drafter.project(features_BtC),
                next_ids_Bt,
                begin_B[:, None] + offsets_t,
                write=offsets_t < counts_B[:, None],
                read=read,
            )
            for features_BtC, next_ids_Bt, offsets_t in zip(
                torch.split(features_BTC, self._piece, dim=1),
                torch.split(next_ids_BT, self._piece, dim=1),
                torch.split(offsets_T, self._piece),
                strict=True,
            )
        ]
        rows_B = torch.arange(len(counts_B), device=counts_B.device)
        self._hidden_SH[slots_B] = torch.cat(outputs, dim=1)[rows_B, counts_B - 1]
        self._lengths_S[slots_B] = begin_B + counts_B

    def _step(
        self, slots_B: Tensor, hidden_BTH: Tensor, ids_BT: Tensor, positions_BT: Tensor, *, write: Tensor, read: int
    ) -> Tensor:
        """One step over positions [B, T]; keys and values are kept where `write` [B, T], positions below `read` seen.

        Every query sees the cached positions up to its own, as far as the window goes.
        """
        drafter = self.model.drafter
        layers = drafter.draft_layers()
        where_BT = positions_BT.where(write, -1)
        read = min(read, self._caches[0].size)
        visible_B1TL = self._visible(positions_BT, read)[:, None]

        def attend(layer: int, queries_BhTD: Tensor, keys_BGTD: Tensor, values_BGTD: Tensor) -> Tensor:
            self._caches[layer].write(slots_B, where_BT, keys_BGTD, values_BGTD)
            keys_BGLD, values_BGLD = self._caches[layer].read(slots_B, read)
            return F.scaled_dot_product_attention(
                queries_BhTD,
                keys_BGLD,
                values_BGLD,
                attn_mask=visible_B1TL,
                scale=layers[layer].attention.scale,
                enable_gqa=True,
            )

        rotary = drafter.rotary(hidden_BTH, positions_BT)
        output_BTH: Tensor = drafter(hidden_BTH, self.model.embed_tokens(ids_BT), rotary, attend)
        return output_BTH

    def _visible(self, positions_BT: Tensor, read: int) -> Tensor:
        """Which cache entries a query at each position sees, [B, T, read] bool."""
        entries_L, window = torch.arange(read, device=positions_BT.device), self.model.window
        if window is None:
            return entries_L <= positions_BT[..., None]
        # An entry's position is the latest up to the query's that it can hold. The cache is larger than the window by
        # all that is written after it, so an entry that lies within the window still holds that position.
        behind_BTL = (positions_BT[..., None] - entries_L) % self._caches[0].size
        return (behind_BTL < window) & (behind_BTL <= positions_BT[..., None])
