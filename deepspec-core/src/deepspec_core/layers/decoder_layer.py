"""One decoder layer of a draft, in its family's residual layout, around an attention that the algorithm performs.

Knows where the norms stand and how weights are initialised. Does not know any family, or what is attended to.

Legend: ... any leading dimensions, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.layers.attention import DraftAttention

__all__ = ["DraftLayer", "initialise"]


class DraftLayer(nn.Module):
    """A decoder layer with the norms and the MLP of its family.

    With h its input: r = h + after_attention(attend(before_attention(h))), and the output is output_scale(r +
    after_mlp(mlp(before_mlp(r)))). `attention_input` is the width of the attention's input, by default the hidden size.

    `around_attention` and `around_mlp` are slots for modules that change a sublayer: each is called with it, a callable
    from [..., T, I] to [..., T, H], and returns what runs in its place. An algorithm may set them.
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
        self.norm_names = dict(norms.names)

    def forward(self, hidden_TH: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The output [..., T, H] for input [..., T, H]. `attend` maps the normed input to the attention's output."""
        return self.finish(hidden_TH, self.around_attention(attend)(self.before_attention(hidden_TH)))

    def finish(self, residual_TH: Tensor, attended_TH: Tensor) -> Tensor:
        """Everything after the attention, for layers whose attention reads more than the residual stream."""
        hidden_TH: Tensor = residual_TH + self.after_attention(attended_TH)
        mlp_TH = self.around_mlp(self.mlp)(self.before_mlp(hidden_TH))
        output_TH: Tensor = self.output_scale(hidden_TH + self.after_mlp(mlp_TH))
        return output_TH


def initialise(module: nn.Module, std: float) -> None:
    """Draw new weights: normal(0, std) for linear layers and embeddings, zero for biases. Norms stay one."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
