"""The qwen2 family (Qwen2, Qwen2.5): pre-norm layers, biases on q, k and v, SwiGLU, plain embedding and logits.

Knows the family's layout and published names; not who uses the blocks, nor how a target runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, Qwen2RotaryEmbedding

from deepspec_core.contracts.target import AttentionProjections, ConversationFormat, LayerNorms, SamplingDefaults
from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.families.layouts import pre_norms, projections


class Qwen2Adapter(FamilyAdapter):
    """Qwen2 dense models, tied or untied, with or without sliding-window layers in the target."""

    class_prefix = "Qwen2"
    spare_tokens: ClassVar[Mapping[int, int]] = {151936: 151669, 152064: 151669}  # beyond the tokenizer's

    def conversation_format(self) -> ConversationFormat:
        """ChatML turns; the recommended sampling of the instruction-tuned models."""
        return ConversationFormat(
            assistant_start="<|im_start|>assistant\n",
            assistant_ends=("<|im_end|>",),
            sampling=SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20),
        )

    def attention_projections(self, in_features: int) -> AttentionProjections:
        """Separate q, k, v with biases, o without; scores times head_dim^-0.5."""
        return projections(self, in_features, bias=True)

    def layer_norms(self) -> LayerNorms:
        """One norm before attention, one before the MLP."""
        return pre_norms(self)

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """RMSNorm in fp32 with the config's epsilon."""
        size = size or self.text.hidden_size
        norm: nn.Module = Qwen2RMSNorm(size, eps=self.text.rms_norm_eps)
        return norm if scale else nn.RMSNorm(size, eps=self.text.rms_norm_eps, elementwise_affine=False)

    def mlp(self) -> nn.Module:
        """SwiGLU: down(silu(gate(x)) * up(x)), without biases."""
        mlp: nn.Module = Qwen2MLP(self.shape)
        return self.new(mlp)

    def rotary(self) -> nn.Module:
        """Rotary embedding with the config's rope parameters over the draft's head_dim."""
        rotary: nn.Module = Qwen2RotaryEmbedding(self.shape)
        return rotary
