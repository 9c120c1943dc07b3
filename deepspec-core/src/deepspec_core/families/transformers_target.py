"""Any transformers causal language model as a contracts.target.TargetModel.

It runs the decoder and the lm_head separately and never the model's own forward, so that logits are formed only where
they are needed. The soft cap is read from the architecture. Knows transformers' conventions; knows no family and no
algorithm.

Legend: B sequences or slots, T tokens, H hidden size, C = taps * H, V vocabulary, S slots open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepspec_core.contracts.target import TargetArchitecture, TargetFeatures, TargetStep
from deepspec_core.errors import TargetError
from deepspec_core.families.grouped_attention import read_shared_keys
from deepspec_core.families.masks import MaskBuilder
from deepspec_core.families.slot_cache import SlotCache
from deepspec_core.layers.softcap import softcapped
from deepspec_core.targets.taps import check_taps

__all__ = ["TransformersTarget"]


class TransformersTarget:
    """`model` is a transformers causal LM, whose decoder has `layers` and is called with ready-made masks.

    The model is frozen and put into evaluation mode.
    """

    def __init__(self, model: Any, architecture: TargetArchitecture) -> None:
        self.architecture = architecture
        self.model = model.eval().requires_grad_(False)
        read_shared_keys(model)
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.device: torch.device = self.decoder.get_input_embeddings().weight.device
        self.dtype: torch.dtype = model.dtype
        self.masks = MaskBuilder(model.config.get_text_config(), self.dtype)
        self.taps = LayerTaps(self.decoder.layers)
        self.cache: SlotCache
        self.committed_S: Tensor
        self.longest = 0

    @torch.no_grad()
    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        taps: Sequence[int],
    ) -> TargetFeatures:
        """Taps [B, T, C] and final norm [B, T, H] of right-padded or packed sequences [B, T].

        Padding needs no mask, because it is on the right, where causal attention does not look.
        """
        mask_BT = attention_mask.bool()
        torch._assert_async((mask_BT[:, 1:] <= mask_BT[:, :-1]).all(), "sequences must be padded on the right")
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        mask = self.masks.sequences(length, document_ids, input_ids.device)
        self.taps.select(taps)
        last_BTH = self.decoder(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return TargetFeatures(hidden=self.taps.take(last_BTH), last_hidden=last_BTH)

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Make room for num_slots sequences of at most max_length tokens; memory is taken as layers first write."""
        self.cache = SlotCache(num_slots, max_length)
        self.committed_S = torch.zeros(num_slots, dtype=torch.long, device=self.device)
        self.keys_L = torch.arange(max_length, device=self.device)
        self.longest = 0

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
        """Logits [B, T, V] (or [B, 1, V]) and taps [B, T, C] of new tokens on top of what is committed,
        and the final norm [B, T, H].

        `slots` ascend. Each row of `positions` goes on from its slot's committed length, -1 on the right. With `sees`
        [B, T, T] the new tokens are a tree.
        """
        cells = positions if sees is None else self._cells(slots, positions)
        self._check(slots, positions, cells, sees)
        length = self._reach(cells)
        self.cache.aim(slots, cells, length)
        self.taps.select(taps)
        keys_L = self.keys_L[:length]
        hidden_BTH = self.decoder(
            input_ids=input_ids,
            attention_mask=self.masks.incremental(positions, keys_L)
            if sees is None
            else self.masks.branching(positions, cells, sees, keys_L),
            position_ids=positions.clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        features_BTC = self.taps.take(hidden_BTH)
        read_BTH = hidden_BTH
        if last_only:
            last_B = (positions >= 0).sum(1).sub(1).clamp(min=0)
            read_BTH = hidden_BTH[torch.arange(len(slots), device=last_B.device), last_B][:, None]
        return TargetStep(logits=self._logits(read_BTH), hidden=features_BTC, last_hidden=hidden_BTH)

    def commit(self, slots: Tensor, lengths: Tensor, kept: Tensor | None = None) -> None:
        """Keep the first lengths[b] tokens of slots[b]; later tokens are overwritten by the next decode.

        `kept` [B, N]: which columns of the last decode they are, after those committed before. None: the first.
        """
        if kept is not None:
            before_B1 = self.committed_S[slots][:, None]
            to_BN = before_B1 + torch.arange(kept.shape[1], device=kept.device)
            stays_BN = to_BN < lengths[:, None]
            self.cache.move(slots, (before_B1 + kept).where(stays_BN, -1), to_BN.where(stays_BN, -1))
        self.committed_S[slots] = lengths.to(self.committed_S)
        self.longest = int(self.committed_S.max())

    def embedding_weight(self) -> Tensor:
        """[V, H]"""
        return _plain_weight(self.decoder.get_input_embeddings())

    def head_weight(self) -> Tensor:
        """[V, H]"""
        return _plain_weight(self.head)

    def _logits(self, hidden: Tensor) -> Tensor:
        return softcapped(self.head(hidden), self.architecture.logit_softcap)

    def _cells(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The cells of a tree's tokens, [B, T]: consecutive, after the committed tokens."""
        order_T = torch.arange(positions.shape[1], device=positions.device)
        return (self.committed_S[slots][:, None] + order_T).where(positions >= 0, -1)

    def _reach(self, cells: Tensor) -> int:
        # Exact on the CPU; on an accelerator an upper bound, because reading the tensor would wait for the device.
        if cells.device.type == "cpu":
            return int(cells.max().clamp(min=0)) + 1
        return min(self.longest + cells.shape[1], self.cache.max_length)

    def _check(self, slots: Tensor, positions: Tensor, cells: Tensor, sees: Tensor | None) -> None:
        """Check positions and slot order: wrong ones would silently decode wrong text. Does not wait for the device."""
        first = positions[:, 0]
        fits = ((first == self.committed_S[slots]) | (first < 0)).all()
        if sees is not None:
            expected = first[:, None] + sees.sum(2) - 1
            fits = fits & ((positions == expected) | (positions < 0)).all() & (sees.tril() == sees).all()
        if len(slots) > 1:
            fits = fits & (slots[1:] > slots[:-1]).all()
        torch._assert_async(
            fits & (cells < self.cache.max_length).all(),
            "decode: slots must ascend; positions go on from the committed lengths and stay below max_length",
        )


class LayerTaps:
    """Keeps outputs of chosen decoder layers during a forward pass. Hooks are set only when the choice changes."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.chosen: tuple[int, ...] = ()
        self.handles: list[RemovableHandle] = []
        self.kept: dict[int, Tensor] = {}

    def select(self, taps: Sequence[int]) -> None:
        """Set the taps of the next forward passes, or none. TargetError if they are out of range or out of order."""
        if tuple(taps) == self.chosen:
            return
        chosen = check_taps(taps, len(self.layers)) if taps else ()
        for handle in self.handles:
            handle.remove()
        self.handles = [self._hook(tap) for tap in chosen]
        self.chosen = chosen

    def take(self, like: Tensor) -> Tensor:
        """The taps [B, T, C] of the last forward pass, on the device of `like` [B, T, H]. Frees the kept outputs."""
        kept = [self.kept.pop(tap).to(like.device) for tap in self.chosen]
        return torch.cat(kept, dim=-1) if kept else like.new_empty((*like.shape[:-1], 0))

    def _hook(self, tap: int) -> RemovableHandle:
        if tap < 0:
            # What enters the first layer: the embedding with whatever the family does to it.
            def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
                self.kept[tap] = args[0]

            return self.layers[0].register_forward_pre_hook(before)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self.kept[tap] = output[0] if isinstance(output, tuple) else output

        return self.layers[tap].register_forward_hook(after)


def _plain_weight(module: nn.Module) -> Tensor:
    """A module's weight as plain 16- or 32-bit numbers, dequantised if the module or its weight has `dequantize`."""
    weight: Any = module.weight
    part: Any
    for part in (module, weight):
        dequantise = getattr(type(part), "dequantize", Tensor.dequantize)
        # torch's own turns any tensor into float32, also the raw codes of a quantised weight.
        if dequantise is not Tensor.dequantize:
            weight = dequantise(part)
            break
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TargetError(
            "the target's embedding or lm_head is quantised and cannot be dequantised",
            found=getattr(weight, "dtype", type(weight).__name__),
            expected="plain 16- or 32-bit weights, which drafts share, or a module or tensor with dequantize()",
            fix="Use a target whose embedding and lm_head are not quantised.",
        )
    return weight.detach()
