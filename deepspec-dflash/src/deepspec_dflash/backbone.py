"""The backbone: draft layers whose attention also sees the target's features, injected as keys and values.

Knows what a block attends to through attention.py and what a layer is through core's blocks; not where the blocks come
from (training or decoding), nor what is predicted from its output. Other drafts build on it.

Legend: B sequences, T context tokens, C = taps * H, H hidden size, N blocks, K block size, G kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from deepspec_core.checkpoints.published import layer_names
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.layers.attention import DraftAttention, Rotary
from deepspec_core.layers.decoder_layer import DraftLayer, as_input, initialise
from deepspec_dflash.attention import BlockLayout, KeysValues, Path, attend


class DFlashBackbone(nn.Module):
    """fc and hidden_norm make the context; `layers` run over blocks; `norm` closes."""

    def __init__(self, adapter: TargetAdapter, *, num_layers: int, num_taps: int) -> None:
        super().__init__()
        hidden_size = adapter.architecture.hidden_size
        self.fc = nn.Linear(num_taps * hidden_size, hidden_size, bias=False)
        initialise(self.fc, adapter.architecture.initializer_range)
        self.hidden_norm = adapter.norm()
        self.layers = nn.ModuleList(DraftLayer(adapter) for _ in range(num_layers))
        self.norm = adapter.norm()
        self.rotary = adapter.rotary()

    def context(self, features_BTC: Tensor) -> Tensor:
        """hidden_norm(fc(features)), [B, T, H]; the same for every layer."""
        context_BTH: Tensor = self.hidden_norm(self.fc(as_input(features_BTC, self.fc)))
        return context_BTH

    def context_keys_values(self, context_BTH: Tensor, positions_BT: Tensor) -> list[KeysValues]:
        """Each layer's keys and values [B, G, T, D] of the context, once a position. positions [B, T] or [1, T]."""
        rotary = self._rotary(context_BTH, positions_BT)
        return [layer.run(layer.attention.keys_values, context_BTH, rotary) for layer in self.draft_layers()]

    def forward(
        self,
        hidden_NKH: Tensor,
        positions_NK: Tensor,
        context: Sequence[KeysValues],
        layout: BlockLayout,
        path: Path | None = None,
    ) -> Tensor:
        """Embedded blocks -> normed outputs, [N, K, H]; `context` as context_keys_values gives it."""
        rotary = self._rotary(hidden_NKH, positions_NK)

        def block_attention(attention: DraftAttention, injected: KeysValues, normed_NKH: Tensor) -> Tensor:
            queries_NhKD = attention.queries(normed_NKH, rotary)
            own = attention.keys_values(normed_NKH, rotary)
            return attention.combine(attend(queries_NhKD, injected, own, layout, scale=attention.scale, path=path))

        for layer, injected in zip(self.draft_layers(), context, strict=True):
            hidden_NKH = layer(hidden_NKH, partial(block_attention, layer.attention, injected))
        output_NKH: Tensor = self.norm(hidden_NKH)
        return output_NKH

    def names(self, under: str) -> dict[str, str]:
        """Published names of the parameters, where the backbone stands at `under` in its draft."""
        own = {f"{under}.{name}": name for name in ("fc", "hidden_norm", "norm")}
        return own | layer_names(self.layers, f"{under}.layers")

    def draft_layers(self) -> list[DraftLayer]:
        """The layers, in order."""
        return [cast(DraftLayer, layer) for layer in self.layers]

    def _rotary(self, x: Tensor, positions: Tensor) -> Rotary:
        return cast(Rotary, self.rotary(x, positions))
