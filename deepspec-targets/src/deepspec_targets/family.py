"""What every family's adapter shares: the draft's shape, new weights, config.json, loading.

Works on any transformers text config; a family subclasses `FamilyAdapter`, names its published class prefix and
conversation format, and builds its own blocks from `self.shape`. Knows no family and no algorithm.

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from deepspec_core.config.schema import LayerOptions
from deepspec_core.contracts.target import (
    AttentionProjections,
    ConversationFormat,
    LayerNorms,
    SpecialTokens,
    TargetArchitecture,
    TargetModel,
)
from torch import nn

from deepspec_targets.masks import MaskBuilder

Module = TypeVar("Module", bound=nn.Module)


class FamilyAdapter:
    """A contracts.target.TargetAdapter but for the blocks and the conversation format, which families add.

    `config` is the target's transformers config. `self.text` is its text part; `self.shape` is the same in the draft's
    own shape, from which families build blocks. `tokens` are the special ids where core has read them from the target's
    generation config and tokenizer; without them the config's own are taken.
    """

    class_prefix: ClassVar[str]
    layer_keys: ClassVar[Mapping[str, str]] = {
        "intermediate_size": "intermediate_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
    }
    ignored_weights: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, config: Any, draft_layer: LayerOptions | None = None, tokens: SpecialTokens | None = None
    ) -> None:
        self.config = config
        self.text = config.get_text_config()
        sizes = {key: getattr(draft_layer, option, None) for option, key in self.layer_keys.items()}
        self.shape = reshaped(self.text, sizes)
        self.architecture = self.describe(tokens or tokens_of(self.text))

    def describe(self, tokens: SpecialTokens) -> TargetArchitecture:
        """The target's numbers, under the names most configs use."""
        return TargetArchitecture(
            model_type=self.config.model_type,
            hidden_size=self.text.hidden_size,
            vocab_size=self.text.vocab_size,
            num_layers=self.text.num_hidden_layers,
            stop_token_ids=tokens.stop,
            pad_token_id=tokens.pad,
            mask_token_id=tokens.mask,
            logit_softcap=getattr(self.text, "final_logit_softcapping", None),
            initializer_range=self.text.initializer_range,
            max_positions=self.text.max_position_embeddings,
        )

    def load(
        self, where: str | Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool = False
    ) -> TargetModel:
        """The frozen target, from a Hugging Face directory. TargetError where weights do not fit the config."""
        from deepspec_targets.loading import load_causal_lm
        from deepspec_targets.transformers_target import TransformersTarget

        model = load_causal_lm(
            where, dtype=dtype, device=device, trust_remote_code=trust_remote_code, ignored=self.ignored_weights
        )
        return TransformersTarget(model, self.architecture)

    def new(self, module: Module) -> Module:
        """`module` with new weights: Linear and Embedding normal(0, initializer_range), biases 0, the rest kept."""
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=self.architecture.initializer_range)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        return module

    def linear(self, in_features: int, out_features: int, *, bias: bool = False) -> nn.Linear:
        """A projection with new weights."""
        return self.new(nn.Linear(in_features, out_features, bias=bias))

    def embedding(self) -> nn.Module:
        """Token ids -> [..., H]; families that scale their embedding override this."""
        return self.new(nn.Embedding(self.text.vocab_size, self.text.hidden_size))

    def draft_config(self, layers: int, extra: Mapping[str, Any]) -> Any:
        """The target's text config in the draft's shape: `layers` full-attention layers, untied, `extra` at top level.

        `architectures` is None unless `extra` has it.
        """
        fields = self.shape.to_dict()
        for about_target in ("transformers_version", "_name_or_path", "quantization_config"):
            fields.pop(about_target, None)
        fields |= {
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
            "tie_word_embeddings": False,
            "architectures": None,
        }
        return type(self.shape).from_dict(fields | dict(extra))

    def unsupported(self) -> str | None:
        """Why this target, or a draft in this shape, cannot be handled, or None."""
        unknown = MaskBuilder.unknown_types(self.text)
        if unknown:
            return f"the target has layers of type {', '.join(sorted(unknown))}"
        heads, kv_heads = self.shape.num_attention_heads, self.shape.num_key_value_heads
        if heads % kv_heads:
            return f"the draft's {heads} attention heads cannot share {kv_heads} key-value heads evenly"
        return None

    # What a family adds.

    def conversation_format(self) -> ConversationFormat:
        """Where the assistant speaks, and how the family's makers sample."""
        raise NotImplementedError

    def attention_projections(self, in_features: int) -> AttentionProjections:
        """q, k, v, out and their norms in the draft's shape."""
        raise NotImplementedError

    def layer_norms(self) -> LayerNorms:
        """The norms around a layer."""
        raise NotImplementedError

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """The family's norm over `size` (H) features."""
        raise NotImplementedError

    def mlp(self) -> nn.Module:
        """[..., H] -> [..., H]."""
        raise NotImplementedError

    def rotary(self) -> nn.Module:
        """(x, position_ids [B, T]) -> (cos, sin)."""
        raise NotImplementedError


def reshaped(text: Any, sizes: Mapping[str, int | None]) -> Any:
    """A copy of a text config with those sizes that are given."""
    return type(text).from_dict(text.to_dict() | {key: size for key, size in sizes.items() if size is not None})


def tokens_of(text: Any) -> SpecialTokens:
    """The special ids a config itself names; its padding falls back to a stop token, then to 0."""
    stop = text.eos_token_id
    stop = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    pad = text.pad_token_id if text.pad_token_id is not None else next(iter(stop), 0)
    return SpecialTokens(stop=stop, pad=pad)
