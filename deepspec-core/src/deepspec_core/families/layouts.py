"""Layouts of attention, norms and rotary embedding that several families share, under their usual published names.

Knows the parts of such layouts. The families decide which layout they use, with which scales and biases.

Legend: B sequences, T tokens, H hidden size, h heads, D head size.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from deepspec_core.contracts.target import AttentionProjections, LayerNorms
from deepspec_core.families.adapter import FamilyAdapter

__all__ = ["AcrossHeads", "FullAttentionRotary", "post_norms", "pre_norms", "projections", "sandwich_norms"]


def projections(
    adapter: FamilyAdapter,
    in_features: int,
    *,
    bias: bool = False,
    out_bias: bool = False,
    norms: Literal["none", "each head", "all heads"] = "none",
    values_from_keys: bool = False,
    value_norm: nn.Module | None = None,
    scale: float | None = None,
) -> AttentionProjections:
    """q, k, v and o as separate projections, with the norms of q and k, in the draft's shape.

    `norms` says over what q and k are normed: each head by itself, or the whole projection. The scale is head_dim^-0.5
    if None. With `values_from_keys` there is no value projection.
    """
    heads, kv_heads, head_dim = adapter.attention_heads()
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    if values_from_keys:
        del names["value"]
    query_norm: nn.Module = nn.Identity()
    key_norm: nn.Module = nn.Identity()
    if norms == "each head":
        query_norm, key_norm = adapter.norm(head_dim), adapter.norm(head_dim)
        names |= {"query_norm": "q_norm", "key_norm": "k_norm"}
    elif norms == "all heads":
        query_norm = AcrossHeads(adapter.norm(heads * head_dim))
        key_norm = AcrossHeads(adapter.norm(kv_heads * head_dim))
        names |= {"query_norm.norm": "q_norm", "key_norm.norm": "k_norm"}
    return AttentionProjections(
        query=adapter.linear(in_features, heads * head_dim, bias=bias),
        key=adapter.linear(in_features, kv_heads * head_dim, bias=bias),
        value=None if values_from_keys else adapter.linear(in_features, kv_heads * head_dim, bias=bias),
        out=adapter.linear(heads * head_dim, adapter.text.hidden_size, bias=out_bias),
        query_norm=query_norm,
        key_norm=key_norm,
        value_norm=value_norm or nn.Identity(),
        scale=head_dim**-0.5 if scale is None else scale,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        window=adapter.draft_layer.window,
        names=names,
    )


def pre_norms(adapter: FamilyAdapter) -> LayerNorms:
    """One norm before attention, one before the MLP (published as `post_attention_layernorm`)."""
    return LayerNorms(
        before_attention=adapter.norm(),
        before_mlp=adapter.norm(),
        names={"before_attention": "input_layernorm.weight", "before_mlp": "post_attention_layernorm.weight"},
    )


def post_norms(adapter: FamilyAdapter) -> LayerNorms:
    """One norm after attention, one after the MLP, each before its residual sum."""
    names = {"after_attention": "post_attention_layernorm.weight", "after_mlp": "post_feedforward_layernorm.weight"}
    return LayerNorms(after_attention=adapter.norm(), after_mlp=adapter.norm(), names=names)


def sandwich_norms(adapter: FamilyAdapter, output_scale: nn.Module | None = None) -> LayerNorms:
    """Norms before and after attention and MLP; `output_scale`, published as `layer_scalar`, multiplies the output."""
    names = {
        "before_attention": "input_layernorm.weight",
        "after_attention": "post_attention_layernorm.weight",
        "before_mlp": "pre_feedforward_layernorm.weight",
        "after_mlp": "post_feedforward_layernorm.weight",
    }
    return LayerNorms(
        before_attention=adapter.norm(),
        after_attention=adapter.norm(),
        before_mlp=adapter.norm(),
        after_mlp=adapter.norm(),
        output_scale=output_scale or nn.Identity(),
        names=names if output_scale is None else names | {"output_scale": "layer_scalar"},
    )


class AcrossHeads(nn.Module):
    """A norm over the whole projection of a token, for the slots of AttentionProjections that get it head by head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """[..., h, D] -> [..., h, D]; `norm` acts on [..., h * D]."""
        normed: Tensor = self.norm(x.flatten(-2)).unflatten(-1, x.shape[-2:])
        return normed


class FullAttentionRotary(nn.Module):
    """The `full_attention` entry of a rotary embedding that has one for each layer type."""

    def __init__(self, by_layer_type: nn.Module) -> None:
        super().__init__()
        self.by_layer_type = by_layer_type

    def forward(self, x: Tensor, position_ids_BT: Tensor) -> Any:
        """(cos, sin), each [B, T, head_dim]."""
        return self.by_layer_type(x, position_ids_BT, "full_attention")
