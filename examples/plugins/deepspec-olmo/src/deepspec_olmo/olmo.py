"""OLMo 2 and 3: norms after attention and MLP, and over whole query and key projections. Drafts have OLMo 2 layers."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP, Olmo2RMSNorm, Olmo2RotaryEmbedding

from deepspec_core.contracts.target import AttentionProjections, ConversationFormat, LayerNorms
from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.families.layouts import post_norms, projections


class OlmoAdapter(FamilyAdapter):
    """Reads both config classes."""

    class_prefix = "Olmo2"
    draft_class = Olmo2Config
    slides_alike = False  # an OLMo 2 config knows no sliding layers

    def draft_shape(self, sizes: Mapping[str, Any]) -> Any:
        """Of OLMo 3, the rotary embedding of full attention."""
        rope = {"rope_parameters": self.text.rope_parameters, **sizes}["rope_parameters"]
        return super().draft_shape({**sizes, "rope_parameters": rope.get("full_attention", rope)})

    def conversation_format(self) -> ConversationFormat:
        """Tags of its own in OLMo 2, ChatML in OLMo 3."""
        if self.text.model_type == "olmo2":
            return ConversationFormat(assistant_start="<|assistant|>\n", assistant_ends=("<|endoftext|>",))
        return ConversationFormat(assistant_start="<|im_start|>assistant\n", assistant_ends=("<|im_end|>",))

    def attention_projections(self, in_features: int) -> AttentionProjections:
        """Query and key normed over all heads."""
        bias = self.shape.attention_bias
        return projections(self, in_features, bias=bias, out_bias=bias, norms="all heads")

    def layer_norms(self) -> LayerNorms:
        """After attention, and after the MLP."""
        return post_norms(self)

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """RMSNorm in fp32."""
        size, eps = size or self.text.hidden_size, self.text.rms_norm_eps
        return Olmo2RMSNorm(size, eps=eps) if scale else nn.RMSNorm(size, eps=eps, elementwise_affine=False)

    def mlp(self) -> nn.Module:
        """SwiGLU."""
        return self.new(Olmo2MLP(self.shape))

    def rotary(self) -> nn.Module:
        """Over the draft's head size."""
        return Olmo2RotaryEmbedding(self.shape)
