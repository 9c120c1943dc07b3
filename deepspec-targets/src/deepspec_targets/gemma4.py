"""The gemma4 family: what draft layers take from the target's full-attention layers, sandwich norms, a layer scalar.

Knows the family's layout, its published names and both spellings of its config (gemma4_config.py); not who uses the
blocks, nor how a target runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4RMSNorm,
    Gemma4TextMLP,
    Gemma4TextRotaryEmbedding,
    Gemma4TextScaledWordEmbedding,
)

from deepspec_core.contracts.target import AttentionProjections, ConversationFormat, LayerNorms, SamplingDefaults
from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.families.layouts import FullAttentionRotary, projections, sandwich_norms
from deepspec_targets.gemma4_config import published_class, published_fields, text_config

# A draft layer has none of these, whatever the target has.
_DENSE = {
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 0,
}


class Gemma4Adapter(FamilyAdapter):
    """Gemma 4 text models, and the text part of its multimodal ones, in both ways they are put together."""

    class_prefix = "Gemma4"
    text_weights: ClassVar[Mapping[str, str]] = {r"^model\.language_model\.": "model."}
    ignored_weights = (r"(model\.)?(vision_|audio_|embed_vision|embed_audio)",)
    slides_alike = False  # sliding layers have another head size and rotary embedding
    known_taps: ClassVar[Mapping[tuple[int, int], tuple[int, ...]]] = {(48, 3840): (5, 17, 29, 41, 46)}  # 12B

    def text_config(self, config: Any) -> Any:
        """The text part, in the spelling that the installed transformers computes with."""
        return text_config(config)

    def size_keys(self) -> Mapping[str, str]:
        """Those of full attention, in the older spelling of the config."""
        kv_heads = "num_global_key_value_heads" if self.text.attention_k_eq_v else "num_key_value_heads"
        return {**super().size_keys(), "num_kv_heads": kv_heads, "head_dim": "global_head_dim"}

    def draft_shape(self, sizes: Mapping[str, Any]) -> Any:
        """One dense layer, full attention; the sizes of the target's sliding layers stay beside it, as published."""
        target = published_fields(self.text)
        dense = {key: value for key, value in _DENSE.items() if key in target}
        one_layer = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        config_class: Any = type(self.text)
        return published_class(config_class).from_dict(target | dense | one_layer | dict(sizes))

    def attention_heads(self) -> tuple[int, int, int]:
        """Those of full attention."""
        fields, keys = self.shape.to_dict(), self.size_keys()
        heads, kv_heads, head_dim = (fields[keys[size]] for size in ("num_heads", "num_kv_heads", "head_dim"))
        return heads, kv_heads, head_dim

    def not_dense(self) -> str | None:
        """Experts, or inputs of its own for each layer."""
        if getattr(self.text, "enable_moe_block", False):
            return "mixture-of-experts layers (enable_moe_block)"
        if getattr(self.text, "hidden_size_per_layer_input", 0):
            return "per-layer inputs (hidden_size_per_layer_input)"
        return None

    def unsupported(self) -> str | None:
        """As for every family; and the target's text must be causal."""
        if self.text.use_bidirectional_attention == "all":
            return "the target attends in both directions (use_bidirectional_attention)"
        return super().unsupported()

    def draft_config(self, layers: int, extra: Mapping[str, Any]) -> Any:
        """As for every family; and which target it was, as the published ones say."""
        target = {"target_model_type": self.config.model_type, "target_text_model_type": self.text.model_type}
        return super().draft_config(layers, target | dict(extra))

    def conversation_format(self) -> ConversationFormat:
        """The family's turn markers, a tool call ending where its result begins; the recommended sampling."""
        return ConversationFormat(
            assistant_start="<|turn>model\n",
            assistant_ends=("<turn|>", "<|tool_response>"),
            sampling=SamplingDefaults(temperature=1.0, top_p=0.95, top_k=64),
        )

    def attention_projections(self, in_features: int) -> AttentionProjections:
        """Full attention: scale 1, q and k normed per head, values (or keys as values) normed without a scale."""
        bias = self.shape.attention_bias
        return projections(
            self,
            in_features,
            bias=bias,
            out_bias=bias,
            norms="each head",
            values_from_keys=self.shape.attention_k_eq_v,
            value_norm=self.norm(self.attention_heads()[2], scale=False),
            scale=1.0,
        )

    def layer_norms(self) -> LayerNorms:
        """Norms before and after attention, before and after the MLP; the output times the layer scalar."""
        return sandwich_norms(self, OutputScale())

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """RMSNorm in fp32 with the config's epsilon."""
        norm: nn.Module = Gemma4RMSNorm(size or self.text.hidden_size, eps=self.text.rms_norm_eps, with_scale=scale)
        return norm

    def mlp(self) -> nn.Module:
        """Gated GELU: down(gelu_tanh(gate(x)) * up(x)), without biases."""
        mlp: nn.Module = Gemma4TextMLP(self.shape, 0)
        return self.new(mlp)

    def rotary(self) -> nn.Module:
        """The full-attention rotary embedding (proportional, partial) over the draft's head_dim."""
        return FullAttentionRotary(Gemma4TextRotaryEmbedding(self.shape))

    def embedding(self) -> nn.Module:
        """Token ids -> [..., H], times sqrt(H)."""
        text = self.text
        embedding: nn.Module = Gemma4TextScaledWordEmbedding(
            text.vocab_size, text.hidden_size, padding_idx=None, embed_scale=text.hidden_size**0.5
        )
        return self.new(embedding)


class OutputScale(nn.Module):
    """x times one number, which is kept with the weights and not trained."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]"""
        return x * self.scale
