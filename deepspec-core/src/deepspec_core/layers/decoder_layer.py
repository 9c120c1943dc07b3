"""One decoder layer of a draft, in its family's residual layout, around an attention that the algorithm performs.

Knows where the norms stand and how weights are initialised. Does not know any family, or what is attended to.

Legend: ... any leading dimensions, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.layers.attention import DraftAttention

__all__ = ["DraftLayer", "Run", "as_input", "initialise", "plainly"]

Run = Callable[..., Any]
"""run(function, *arguments): what the function gives."""


def plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it."""
    return function(*arguments)


class DraftLayer(nn.Module):
    """A decoder layer with the norms and the MLP of its family.

    With h its input: r = h + after_attention(attend(before_attention(h))), and the output is output_scale(r +
    after_mlp(mlp(before_mlp(r)))). `attention_input` is the width of the attention's input, by default the hidden size.

    `around_attention` and `around_mlp` are slots for modules that change a sublayer: each is called with it, a callable
    from [..., T, I] to [..., T, H], and returns what runs in its place. An algorithm may set them.

    `run` is a slot for how the layer's code is called: run(function, *arguments) gives what function(*arguments) would.
    Core sets it where activations are to be computed again in backward (layers/recomputing.py). An algorithm whose
    layers' attention does not stand inside `forward` calls the parts around it through `run` too.
    """

    def __init__(self, adapter: TargetAdapter, attention_input: int | None = None) -> None:
        super().__init__()
        norms = adapter.layer_norms()
        self.before_attention, self.after_attention = norms.before_attention, norms.after_attention
        self.before_mlp, self.after_mlp = norms.before_mlp, norms.after_mlp
        self.output_scale = norms.output_scale
        self.attention = DraftAttention(
            adapter.attention_projections(attention_input or adapter.architecture.hidden_size)
        )
        self.mlp = adapter.mlp()
        self.around_attention: nn.Module = nn.Identity()
        self.around_mlp: nn.Module = nn.Identity()
        self.run: Run = plainly
        self.norm_names = dict(norms.names)

    def forward(self, hidden_TH: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The output [..., T, H] for input [..., T, H]. `attend` maps the normed input to the attention's output."""
        output_TH: Tensor = self.run(self._whole, hidden_TH, attend)
        return output_TH

    def finish(self, residual_TH: Tensor, attended_TH: Tensor) -> Tensor:
        """Everything after the attention, for layers whose attention reads more than the residual stream."""
        output_TH: Tensor = self.run(self._finish, residual_TH, attended_TH)
        return output_TH

    def _whole(self, hidden_TH: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        return self._finish(hidden_TH, self.around_attention(attend)(self.before_attention(hidden_TH)))

    def _finish(self, residual_TH: Tensor, attended_TH: Tensor) -> Tensor:
        hidden_TH: Tensor = residual_TH + self.after_attention(attended_TH)
        mlp_TH = self.around_mlp(self.mlp)(self.before_mlp(hidden_TH))
        output_TH: Tensor = self.output_scale(hidden_TH + self.after_mlp(mlp_TH))
        return output_TH


def as_input(features: Tensor, projection: nn.Linear) -> Tensor:
    """The target's features in the dtype in which `projection` reads them.

    Under autocast that is autocast's, which needs no copy of features that have it; a copy in the dtype of the weights
    would be twice as large, and a second one would be made of it.
    """
    device = features.device.type
    autocast = torch.is_autocast_enabled(device)
    return features.to(torch.get_autocast_dtype(device) if autocast else projection.weight.dtype)


def initialise(module: nn.Module, std: float) -> None:
    """Draw new weights: normal(0, std) for linear layers and embeddings, zero for biases. Norms stay one."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
