"""A tiny random target for tests: causal attention over a small vocabulary, deterministic in its seed.

Implements contracts.target.TargetModel with plain tensors, so core's own tests need neither a family nor a download. It
checks how it is driven: positions must continue what was committed.

Legend: B sequences or slots, S all slots, T tokens, L cache length, H hidden size, C = taps * H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec_core.contracts.target import TargetArchitecture, TargetFeatures, TargetStep
from deepspec_core.decoding.kv_cache import SlotKVCache

__all__ = ["TinyTarget"]


class TinyTarget:
    """A target with random weights.

    `sharpness` scales the logits: greedy and sampled text differ less if it is high.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 64,
        hidden_size: int = 16,
        num_layers: int = 4,
        stop_token_ids: tuple[int, ...] = (1,),
        max_positions: int = 512,
        sharpness: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.architecture = TargetArchitecture(
            model_type="tiny",
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            num_layers=num_layers,
            stop_token_ids=stop_token_ids,
            pad_token_id=0,
            mask_token_id=vocab_size - 1,
            logit_softcap=None,
            initializer_range=0.02,
            max_positions=max_positions,
        )
        self.device = torch.device("cpu")
        self.dtype = dtype
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> Tensor:
            values: Tensor = torch.randn(*shape, generator=generator) / float(shape[-1]) ** 0.5
            return values.to(dtype)

        self._embedding_VH: Tensor = weights(vocab_size, hidden_size) * float(hidden_size) ** 0.5
        self._positions_LH: Tensor = weights(max_positions, hidden_size) * float(hidden_size) ** 0.5
        self._head_VH: Tensor = weights(vocab_size, hidden_size) * sharpness
        # One row a layer: query, key, value, output, MLP.
        self._layers = [[weights(hidden_size, hidden_size) for _ in range(5)] for _ in range(num_layers)]
        self._caches: list[SlotKVCache] = []
        self._committed_S = torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        taps: Sequence[int],
    ) -> TargetFeatures:
        """As the contract says; packed rows keep to their own document."""
        B, T = input_ids.shape
        positions_BT = torch.arange(T).expand(B, T) if position_ids is None else position_ids
        visible_BTT = torch.ones(T, T, dtype=torch.bool).tril() & attention_mask.bool()[:, None]
        if document_ids is not None:
            visible_BTT = visible_BTT & (document_ids[:, :, None] == document_ids[:, None])
        visible_BTT = visible_BTT | torch.eye(T, dtype=torch.bool)  # padding sees itself: no empty softmax
        tapped_BTC, last_BTH = self._forward(input_ids, positions_BT, positions_BT, visible_BTT, taps, None)
        return TargetFeatures(hidden=tapped_BTC, last_hidden=last_BTH)

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Fresh caches, nothing committed."""
        self._caches = [
            SlotKVCache(
                num_slots=num_slots,
                num_kv_heads=1,
                head_dim=self.architecture.hidden_size,
                max_length=max_length,
                dtype=self.dtype,
                device=self.device,
            )
            for _ in self._layers
        ]
        self._committed_S = torch.zeros(num_slots, dtype=torch.long)

    @torch.no_grad()
    def decode(
        self,
        slots: Tensor,
        input_ids: Tensor,
        positions: Tensor,
        taps: Sequence[int],
        *,
        last_only: bool = False,
        sees: Tensor | None = None,
    ) -> TargetStep:
        """As the contract says."""
        real_BT, committed_B1 = positions >= 0, self._committed_S[slots][:, None]
        order_T = torch.arange(positions.shape[1])
        depth_BT = order_T.expand_as(positions) if sees is None else sees.sum(2) - 1
        expected_BT = torch.where(real_BT, committed_B1 + depth_BT, -1)
        assert torch.equal(positions, expected_BT), "positions do not continue the slots"
        cells_BT = torch.where(real_BT, committed_B1 + order_T, -1)
        keys_L = torch.arange(int(cells_BT.max()) + 1)
        if sees is None:
            visible_BTL = keys_L <= positions.clamp(min=0)[:, :, None]
        else:
            new_BTL = torch.zeros(*positions.shape, len(keys_L) + len(order_T), dtype=torch.bool)
            columns_BT = (committed_B1 + order_T)[:, None].expand_as(sees)
            visible_BTL = new_BTL.scatter(2, columns_BT, sees)[..., : len(keys_L)] | (keys_L < committed_B1)[:, None]
        tapped_BTC, last_BTH = self._forward(input_ids, positions, cells_BT, visible_BTL, taps, slots)
        read_BTH = last_BTH
        if last_only:
            read_BTH = last_BTH[torch.arange(len(slots)), real_BT.sum(1) - 1][:, None]
        return TargetStep(logits=read_BTH @ self._head_VH.T, hidden=tapped_BTC, last_hidden=last_BTH)

    def commit(self, slots: Tensor, lengths: Tensor, kept: Tensor | None = None) -> None:
        """Keep the first lengths[b] tokens of slots[b], of the last `decode` those in the columns `kept`."""
        if kept is not None:
            committed_B1 = self._committed_S[slots][:, None]
            to_BN = committed_B1 + torch.arange(kept.shape[1])
            stays_BN = to_BN < lengths[:, None]
            for cache in self._caches:
                cache.move(slots, (committed_B1 + kept).where(stays_BN, -1), to_BN.where(stays_BN, -1))
        self._committed_S[slots] = lengths

    def embedding_weight(self) -> Tensor:
        """[V, H]."""
        return self._embedding_VH

    def head_weight(self) -> Tensor:
        """[V, H]."""
        return self._head_VH

    def _forward(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        cells_BT: Tensor,
        visible_BTL: Tensor,
        taps: Sequence[int],
        slots_B: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x_BTH = self._embedding_VH[ids_BT] + self._positions_LH[positions_BT.clamp(min=0)]
        outputs = []
        for index, (query, key, value, out, mlp) in enumerate(self._layers):
            q_BTH, k_BTH, v_BTH = x_BTH @ query, x_BTH @ key, x_BTH @ value
            if slots_B is not None:
                cache = self._caches[index]
                cache.write(slots_B, cells_BT, k_BTH[:, None], v_BTH[:, None])
                keys_BGLH, values_BGLH = cache.read(slots_B, visible_BTL.shape[-1])
                k_BTH, v_BTH = keys_BGLH[:, 0], values_BGLH[:, 0]
            scores_BTL = q_BTH @ k_BTH.transpose(1, 2) / self.architecture.hidden_size**0.5
            attended_BTH = scores_BTL.masked_fill(~visible_BTL, float("-inf")).softmax(-1) @ v_BTH
            x_BTH = x_BTH + attended_BTH @ out
            x_BTH = x_BTH + torch.tanh(x_BTH @ mlp)
            outputs.append(x_BTH)
        tapped = [outputs[tap] for tap in sorted(taps)]
        tapped_BTC = torch.cat(tapped, -1) if tapped else x_BTH[..., :0]
        last_BTH = x_BTH / x_BTH.float().square().mean(-1, keepdim=True).sqrt().to(x_BTH.dtype)
        return tapped_BTC, last_BTH
