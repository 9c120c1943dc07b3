"""The network of one step: target features or its own last output, and the next token, to the next output.

Knows projections, layers and their published names; not who attends to whom (callers bring that), how many steps there
are, nor what is predicted from an output.

Legend: B sequences, T tokens, C = taps * H, H hidden size, h query heads, G kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from deepspec_core.checkpoints.published import layer_names
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.layers.attention import Rotary
from deepspec_core.layers.decoder_layer import DraftLayer, as_input, initialise

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Eagle3Drafter(nn.Module):
    """fc projects target features; the first layer's attention sees [normed token ; normed hidden], 2H wide, beside a
    residual stream of hidden states alone; further layers are plain; `norm` comes before the vocabulary."""

    def __init__(self, adapter: TargetAdapter, *, num_layers: int, num_taps: int, qk_norm: bool) -> None:
        super().__init__()
        hidden_size = adapter.architecture.hidden_size
        self.fc = nn.Linear(num_taps * hidden_size, hidden_size, bias=False)
        initialise(self.fc, adapter.architecture.initializer_range)
        self.hidden_norm = adapter.norm()
        self.layers = nn.ModuleList(
            DraftLayer(adapter, attention_input=None if index else 2 * hidden_size) for index in range(num_layers)
        )
        if not qk_norm:
            for layer in self.draft_layers():
                layer.attention.query_norm, layer.attention.key_norm = nn.Identity(), nn.Identity()
        self.norm = adapter.norm()
        self.rotary_embedding = adapter.rotary()

    def project(self, features_BTC: Tensor) -> Tensor:
        """Target features as the first step's hidden states, [B, T, H]."""
        hidden_BTH: Tensor = self.fc(as_input(features_BTC, self.fc))
        return hidden_BTH

    def rotary(self, x: Tensor, positions_BT: Tensor) -> Rotary:
        """(cos, sin) of positions [B, T] or [1, T]."""
        return cast(Rotary, self.rotary_embedding(x, positions_BT))

    def forward(self, hidden_BTH: Tensor, embedded_BTH: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """The last layer's output [B, T, H], before `norm`: the next step's hidden states.

        attend(layer, queries [B, h, T, D], keys, values [B, G, T, D]) -> [B, h, T, D].
        """
        # The embedding is the target's, and may be in fewer bits than what the draft computes in.
        embedded_BTH = embedded_BTH.to(self.fc.weight.dtype)
        for index, layer in enumerate(self.draft_layers()):
            tokens_BTH = embedded_BTH if index == 0 else None
            projected = layer.run(self._projected, layer, hidden_BTH, tokens_BTH, rotary)
            attended_BhTD = attend(index, *projected)
            hidden_BTH = layer.finish(hidden_BTH, layer.attention.combine(attended_BhTD))
        return hidden_BTH

    def _projected(
        self, layer: DraftLayer, hidden_BTH: Tensor, embedded_BTH: Tensor | None, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's queries [B, h, T, D], keys and values [B, G, T, D]; the first layer reads tokens too."""
        if embedded_BTH is None:
            inputs = layer.before_attention(hidden_BTH)
        else:
            inputs = torch.cat([layer.before_attention(embedded_BTH), self.hidden_norm(hidden_BTH)], dim=-1)
        return layer.attention.queries(inputs, rotary), *layer.attention.keys_values(inputs, rotary)

    def names(self, under: str) -> dict[str, str]:
        """Published names of the parameters, where the drafter stands at `under` in its draft."""
        own = {f"{under}.fc": "fc", f"{under}.norm": "norm", f"{under}.hidden_norm": "layers.0.hidden_norm"}
        return own | layer_names(self.layers, f"{under}.layers")

    def draft_layers(self) -> list[DraftLayer]:
        """The layers, in order."""
        return [cast(DraftLayer, layer) for layer in self.layers]
