"""A tiny target family for tests of drafts: no published architecture, no download. Drafts are built from its blocks.

Sizes are those of random samples (random_batches.py): H 32, V 64, 8 layers. Its targets are not loaded; TinyTarget
stands in for them.

Legend: B sequences, T tokens, H hidden size, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from deepspec_core.contracts.target import AttentionProjections, ConversationFormat, LayerNorms, SpecialTokens
from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.families.layouts import pre_norms, projections
from deepspec_core.layers.options import LayerOptions
from deepspec_core.testing.tiny_tokenizer import tiny_format

__all__ = ["TinyAdapter", "TinyConfig", "tiny_adapter"]


class TinyConfig(PretrainedConfig):  # type: ignore[misc,unused-ignore]
    """The config of the family: as many keys as adapters read."""

    model_type = "tiny"


class TinyAdapter(FamilyAdapter):
    """A contracts.target.TargetAdapter of pre-norm layers with rotary attention and a gated MLP."""

    class_prefix = "Tiny"

    def conversation_format(self) -> ConversationFormat:
        """The conversation format of the tiny tokenizer."""
        return tiny_format()

    def attention_projections(self, in_features: int) -> AttentionProjections:
        """Separate projections, queries and keys normed head by head."""
        return projections(self, in_features, norms="each head")

    def layer_norms(self) -> LayerNorms:
        """Two norms: before attention, and before the MLP."""
        return pre_norms(self)

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """RMSNorm."""
        return _Norm(size or self.text.hidden_size, scale=scale)

    def mlp(self) -> nn.Module:
        """down(silu(gate(x)) * up(x))."""
        return self.new(_GatedMLP(self.text.hidden_size, self.shape.intermediate_size))

    def rotary(self) -> nn.Module:
        """Angles of base 10,000."""
        return _Rotary(self.shape.head_dim)


def tiny_adapter(*, layer: LayerOptions | None = None, softcap: float | None = None, **changes: Any) -> TinyAdapter:
    """An adapter of the tiny family: H 32, V 64, 8 layers, mask token 63.

    `softcap` caps the logits; `layer` is the draft's own shape; `changes` are other keys of the config.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
        "eos_token_id": 1, "pad_token_id": 0, "final_logit_softcapping": softcap,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False,
    }  # fmt: skip
    config = TinyConfig(**(sizes | changes))
    return TinyAdapter(config, layer, SpecialTokens(stop=(1,), pad=0, mask=63))


class _Norm(nn.Module):
    """Computes in fp32, as families do."""

    def __init__(self, size: int, *, scale: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)
        return normed if self.weight is None else self.weight * normed


class _GatedMLP(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, inner, bias=False), nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Rotary(nn.Module):
    frequencies_D: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponents_D = torch.arange(0, head_dim, 2).float() / head_dim
        self.register_buffer("frequencies_D", 1e4**-exponents_D, persistent=False)

    def forward(self, x: Tensor, position_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        angles_BTD = (position_ids_BT.float()[..., None] * self.frequencies_D).repeat(1, 1, 2)
        return angles_BTD.cos().to(x.dtype), angles_BTD.sin().to(x.dtype)
