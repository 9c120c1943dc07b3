"""The llama family and its look-alikes: pre-norm layers, SwiGLU, plain embedding and logits, optional biases.

Knows the layout and published names of Llama and Mistral; not who uses the blocks, nor how a target runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralMLP

from deepspec_core.contracts.target import AttentionProjections, ConversationFormat, LayerNorms, SamplingDefaults
from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.families.layouts import pre_norms, projections

_LLAMA_3_VOCABULARY = 128256


class LlamaAdapter(FamilyAdapter):
    """Llama, and models that are published as one, such as SmolLM2."""

    class_prefix = "Llama"
    spare_tokens: ClassVar[Mapping[int, int]] = {_LLAMA_3_VOCABULARY: 128002}  # a reserved token

    def conversation_format(self) -> ConversationFormat:
        """Llama 3's turns and sampling where the vocabulary is Llama 3's; ChatML, which look-alikes use, elsewhere."""
        sampling = SamplingDefaults(temperature=0.6, top_p=0.9)
        if self.text.vocab_size != _LLAMA_3_VOCABULARY:
            return ConversationFormat(
                assistant_start="<|im_start|>assistant\n", assistant_ends=("<|im_end|>",), sampling=sampling
            )
        return ConversationFormat(
            assistant_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
            assistant_ends=("<|eot_id|>", "<|eom_id|>"),
            sampling=sampling,
        )

    def attention_projections(self, in_features: int) -> AttentionProjections:
        """Separate q, k, v, o with the config's bias; scores times head_dim^-0.5."""
        bias = self.shape.attention_bias
        return projections(self, in_features, bias=bias, out_bias=bias)

    def layer_norms(self) -> LayerNorms:
        """One norm before attention, one before the MLP."""
        return pre_norms(self)

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """RMSNorm in fp32 with the config's epsilon."""
        size = size or self.text.hidden_size
        norm: nn.Module = LlamaRMSNorm(size, eps=self.text.rms_norm_eps)
        return norm if scale else nn.RMSNorm(size, eps=self.text.rms_norm_eps, elementwise_affine=False)

    def mlp(self) -> nn.Module:
        """SwiGLU: down(silu(gate(x)) * up(x)), with the config's biases."""
        mlp: nn.Module = LlamaMLP(self.shape)
        return self.new(mlp)

    def rotary(self) -> nn.Module:
        """Rotary embedding with the config's rope parameters over the draft's head_dim."""
        rotary: nn.Module = LlamaRotaryEmbedding(self.shape)
        return rotary


class MistralAdapter(LlamaAdapter):
    """Mistral: Llama's layers without biases. All of the target's layers slide, or none; the draft's are full."""

    class_prefix = "Mistral"

    def draft_shape(self, sizes: Mapping[str, Any]) -> Any:
        """The config says by its window alone whether layers slide."""
        return super().draft_shape({**sizes, "sliding_window": None})

    def conversation_format(self) -> ConversationFormat:
        """The answer follows the instruction's closing tag and ends with the end token."""
        return ConversationFormat(
            assistant_start="[/INST]", assistant_ends=("</s>",), sampling=SamplingDefaults(temperature=0.7)
        )

    def attention_projections(self, in_features: int) -> AttentionProjections:
        """Separate q, k, v, o without biases; scores times head_dim^-0.5."""
        return projections(self, in_features)

    def mlp(self) -> nn.Module:
        """SwiGLU: down(silu(gate(x)) * up(x)), without biases."""
        mlp: nn.Module = MistralMLP(self.shape)
        return self.new(mlp)
