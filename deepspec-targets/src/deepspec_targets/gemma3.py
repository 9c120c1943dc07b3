"""The gemma3 family: sandwich norms, per-head query and key norms, a scaled embedding, rotary by layer type.

Knows the family's layout and published names; not who uses the blocks, nor how a target runs. Draft layers are shaped
like the target's full-attention layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3MLP,
    Gemma3RMSNorm,
    Gemma3RotaryEmbedding,
    Gemma3TextScaledWordEmbedding,
)

from deepspec_core.contracts.target import AttentionProjections, ConversationFormat, LayerNorms, SamplingDefaults
from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.families.layouts import FullAttentionRotary, projections, sandwich_norms


class Gemma3Adapter(FamilyAdapter):
    """Gemma 3 text models, and the text part of its multimodal ones."""

    class_prefix = "Gemma3"
    text_weights: ClassVar[Mapping[str, str]] = {
        r"^(model\.)?language_model\.(model\.)?(?!lm_head)": "model.",
        r"^language_model\.lm_head": "lm_head",
    }
    ignored_weights = (r"(model\.)?(vision_tower|multi_modal_projector)\.",)
    slides_alike = False  # sliding layers have a rotary embedding of their own

    def draft_shape(self, sizes: Mapping[str, Any]) -> Any:
        """One layer, full attention: what the blocks are built from."""
        shape = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        return super().draft_shape({**sizes, **shape})

    def unsupported(self) -> str | None:
        """As for every family; and the target's text must be causal."""
        if self.text.use_bidirectional_attention:
            return "the target attends in both directions (use_bidirectional_attention)"
        return super().unsupported()

    def conversation_format(self) -> ConversationFormat:
        """The family's turn markers; the recommended sampling."""
        return ConversationFormat(
            assistant_start="<start_of_turn>model\n",
            assistant_ends=("<end_of_turn>",),
            sampling=SamplingDefaults(temperature=1.0, top_p=0.95, top_k=64),
        )

    def attention_projections(self, in_features: int) -> AttentionProjections:
        """Separate q, k, v, o; q and k normed per head; scores times query_pre_attn_scalar^-0.5."""
        bias = self.shape.attention_bias
        scale = self.shape.query_pre_attn_scalar**-0.5
        return projections(self, in_features, bias=bias, out_bias=bias, norms="each head", scale=scale)

    def layer_norms(self) -> LayerNorms:
        """Norms before and after attention, before and after the MLP."""
        return sandwich_norms(self)

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """RMSNorm in fp32; the stored weight is the scale minus one."""
        size = size or self.text.hidden_size
        norm: nn.Module = Gemma3RMSNorm(size, eps=self.text.rms_norm_eps)
        return norm if scale else nn.RMSNorm(size, eps=self.text.rms_norm_eps, elementwise_affine=False)

    def mlp(self) -> nn.Module:
        """Gated GELU: down(gelu_tanh(gate(x)) * up(x)), without biases."""
        mlp: nn.Module = Gemma3MLP(self.shape)
        return self.new(mlp)

    def rotary(self) -> nn.Module:
        """The full-attention rotary embedding over the draft's head_dim."""
        return FullAttentionRotary(Gemma3RotaryEmbedding(self.shape))

    def embedding(self) -> nn.Module:
        """Token ids -> [..., H], times sqrt(H)."""
        text = self.text
        embedding: nn.Module = Gemma3TextScaledWordEmbedding(
            text.vocab_size, text.hidden_size, padding_idx=None, embed_scale=text.hidden_size**0.5
        )
        return self.new(embedding)
