"""A draft layer's attention without its pattern: projections, norms and rotary embedding, in separate steps.

Knows how one family turns hidden states into queries, keys and values, and attended values back into hidden states.
Does not know which positions attend to which, what is cached, or which algorithm asks. The algorithm does that between
the steps.

Legend: ... any leading dimensions, T tokens, I width of the attention input, H hidden size, h query heads, G kv heads,
D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec_core.contracts.target import AttentionProjections

__all__ = ["DraftAttention", "Rotary", "rotate"]

Rotary = tuple[Tensor, Tensor]
"""The cosine and the sine of the rotary embedding, each [..., T, D], at the positions of T tokens."""


def rotate(x_hTD: Tensor, rotary: Rotary) -> Tensor:
    """Apply the rotary embedding in the rotate-half convention: x * cos + rotate_half(x) * sin.

    x is [..., h, T, D], and rotary = (cos, sin), each [..., T, D], broadcast over heads.
    """
    cos_TD, sin_TD = (part.unsqueeze(-3).to(x_hTD.dtype) for part in rotary)
    first, second = x_hTD.chunk(2, dim=-1)
    return x_hTD * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD


class DraftAttention(nn.Module):
    """The projections of one layer's attention: `query`, `key`, `value`, `out` and their norms."""

    def __init__(self, projections: AttentionProjections) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (
            projections.query,
            projections.key,
            projections.value,
            projections.out,
        )
        self.query_norm, self.key_norm, self.value_norm = (
            projections.query_norm,
            projections.key_norm,
            projections.value_norm,
        )
        self.scale, self.head_dim = projections.scale, projections.head_dim
        self.num_heads, self.num_kv_heads = projections.num_heads, projections.num_kv_heads
        self.window = projections.window
        self.names = dict(projections.names)

    def queries(self, hidden_TI: Tensor, rotary: Rotary) -> Tensor:
        """Queries [..., h, T, D] of [..., T, I] at the positions of `rotary`, normed and rotated, but not scaled."""
        heads_ThD: Tensor = self.query(hidden_TI).unflatten(-1, (self.num_heads, self.head_dim))
        return rotate(self.query_norm(heads_ThD).transpose(-3, -2), rotary)

    def keys_values(self, hidden_TI: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys (normed, rotated) and values, each [..., G, T, D], of [..., T, I] at the positions of `rotary`.

        Without a value projection, the output of the key projection, before its norm and rotation, serves as values.
        """
        raw_TGD: Tensor = self.key(hidden_TI).unflatten(-1, (self.num_kv_heads, self.head_dim))
        values_TGD = raw_TGD if self.value is None else self.value(hidden_TI).unflatten(-1, raw_TGD.shape[-2:])
        keys_GTD = rotate(self.key_norm(raw_TGD).transpose(-3, -2), rotary)
        return keys_GTD, self.value_norm(values_TGD).transpose(-3, -2)

    def combine(self, attended_hTD: Tensor) -> Tensor:
        """Project attended values [..., h, T, D] to [..., T, H]."""
        output_TH: Tensor = self.out(attended_hTD.transpose(-3, -2).flatten(-2))
        return output_TH
