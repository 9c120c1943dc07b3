"""The base class of families' adapters: the draft's shape, new weights, config.json, loading.

It works on any transformers text config. A family subclasses `FamilyAdapter`, sets its published class prefix and
conversation format, and builds its own blocks from `self.shape` (layouts.py has blocks that several families share). If
a family has several config classes, each may have its own adapter, or one adapter reads the keys that they share. Knows
no family and no algorithm.

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from deepspec_core.checkpoints.draft_window import DRAFT_WINDOW, SLIDING
from deepspec_core.contracts.target import (
    AttentionProjections,
    ConversationFormat,
    LayerNorms,
    SpecialTokens,
    TargetArchitecture,
    TargetModel,
    TargetVocabulary,
)
from deepspec_core.errors import TargetError
from deepspec_core.families.masks import MaskBuilder
from deepspec_core.families.rotary_kinds import positions, senseless_rotary, varying_rotary, with_rope
from deepspec_core.layers.options import LayerOptions

__all__ = ["FamilyAdapter"]

Module = TypeVar("Module", bound=nn.Module)


class FamilyAdapter(ABC):
    """A contracts.target.TargetAdapter except for the blocks and the conversation format, which families add.

    `config` is the target's transformers config. `self.text` is its text part. `self.shape` is the text part with the
    draft's sizes, from which families build blocks. `tokens` are the special ids that core has read from the target's
    generation config and tokenizer; if None, those of the config are used.

    class_prefix: The beginning of the class names of published drafts.
    draft_class: The config class of the family's drafts, if it differs from the target's.
    text_weights: Patterns that map names of weights in the files of a multimodal model to names in its text part.
    ignored_weights: Patterns of weights that the text part does not need.
    own_draft_weights: Patterns of layers that a target has for drafting. Its answers do not use them; a draft may.
    spare_tokens: By vocabulary size, an id that no text uses: the mask token if the tokenizer has none.
    slides_alike: Whether the family's sliding layers are built like its full-attention layers. A draft with a window
        may then be published with the family's own keys for sliding layers.
    known_taps: The taps of published drafts, by the target's number of layers and hidden size.
    """

    class_prefix: ClassVar[str]
    draft_class: ClassVar[type[Any] | None] = None
    text_weights: ClassVar[Mapping[str, str]] = {}
    ignored_weights: ClassVar[tuple[str, ...]] = ()
    own_draft_weights: ClassVar[tuple[str, ...]] = (r"(model\.)?mtp(_\w+)?\.",)
    spare_tokens: ClassVar[Mapping[int, int]] = {}
    slides_alike: ClassVar[bool] = True
    known_taps: ClassVar[Mapping[tuple[int, int], tuple[int, ...]]] = {}  # by number of layers and hidden size

    def __init__(
        self, config: Any, draft_layer: LayerOptions | None = None, tokens: SpecialTokens | None = None
    ) -> None:
        self.config = config
        self.text = self.text_config(config)
        self.draft_layer = draft_layer or LayerOptions()
        assert self.draft_layer.style is None, "a style takes two adapters: families/styled.py"
        sizes = {key: getattr(self.draft_layer, option) for option, key in self.size_keys().items()}
        own = {key: size for key, size in sizes.items() if size is not None}
        if self.draft_layer.rope is not None:
            own["rope_parameters"] = with_rope(self.text.rope_parameters, self.draft_layer.rope)
        try:
            self.shape = self.draft_shape(own)
        except (ValueError, StrictDataclassError) as error:  # what a config says of sizes that do not go together
            raise TargetError(
                "the draft's layers cannot have these sizes",
                where="[draft.layer]",
                found=str(error).splitlines()[-1].strip(),
                fix="Choose sizes that the target's family allows, or leave them out.",
            ) from error
        self.architecture = self.describe(tokens or tokens_of(self.text))

    def text_config(self, config: Any) -> Any:
        """The text part of the target's config."""
        return config.get_text_config()

    def size_keys(self) -> Mapping[str, str]:
        """The keys of the config that the options of [draft.layer] set, by option."""
        return {
            "intermediate_size": "intermediate_size",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
        }

    def draft_shape(self, sizes: Mapping[str, Any]) -> Any:
        """The text config with the draft's `sizes`, which are given by the config's keys; head_dim is always set.

        With a `draft_class`, it is a config of that class, with the values of the keys that both classes have.
        """
        fields, kind = self.text.to_dict(), self.draft_class or type(self.text)
        if self.draft_class is not None:
            fields = {key: fields[key] for key in kind().to_dict() if key in fields and key != "model_type"}
        return kind.from_dict(fields | {"head_dim": head_dim_of(self.text)} | dict(sizes))

    def describe(self, tokens: SpecialTokens) -> TargetArchitecture:
        """The target's architecture, read from the keys that most configs use."""
        return TargetArchitecture(
            model_type=self.config.model_type,
            hidden_size=self.text.hidden_size,
            vocab_size=self.text.vocab_size,
            num_layers=self.text.num_hidden_layers,
            stop_token_ids=tokens.stop,
            pad_token_id=tokens.pad,
            mask_token_id=self.spare_tokens.get(self.text.vocab_size) if tokens.mask is None else tokens.mask,
            logit_softcap=getattr(self.text, "final_logit_softcapping", None),
            initializer_range=self.text.initializer_range,
            max_positions=positions(self.text),
            name=getattr(self.config, "_name_or_path", ""),
            dense=self.not_dense() is None,
            known_taps=self.known_taps.get((self.text.num_hidden_layers, self.text.hidden_size), ()),
        )

    def load(
        self, where: str | Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool = False
    ) -> TargetModel:
        """The frozen target, from a Hugging Face directory. Of a multimodal model only the text part is loaded.

        A quantised multimodal model is loaded whole, because its quantisation config names modules of the whole model.
        TargetError if weights do not fit the config.
        """
        from deepspec_core.families.loading import load_causal_lm
        from deepspec_core.families.transformers_target import TransformersTarget

        whole = self.text is self.config or getattr(self.config, "quantization_config", None) is not None
        model = load_causal_lm(
            where,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            config=None if whole else self.text,
            renamed={} if whole else self.text_weights,
            ignored=self.own_draft_weights if whole else (*self.own_draft_weights, *self.ignored_weights),
        )
        return TransformersTarget(model, self.architecture)

    def vocabulary(
        self, where: str | Path, *, dtype: torch.dtype, device: torch.device | str
    ) -> TargetVocabulary | None:
        """The embedding and the lm_head alone. None for a quantised target, which only its modules can dequantise."""
        from deepspec_core.families.vocabulary import read_vocabulary

        if any(getattr(config, "quantization_config", None) is not None for config in (self.config, self.text)):
            return None
        renamed = {} if self.text is self.config else self.text_weights
        return read_vocabulary(Path(where), self.text, renamed=renamed, dtype=dtype, device=device)

    def final_norm(self, where: str | Path) -> nn.Module | None:
        """The norm before the lm_head alone. Quantised targets store it like others."""
        from deepspec_core.families.final_norm import read_final_norm

        renamed = {} if self.text is self.config else self.text_weights
        return read_final_norm(Path(where), self.text, renamed=renamed)

    def skeleton(self, *, dtype: torch.dtype) -> TargetModel:
        """The text part with new weights in `dtype`, never quantised."""
        from transformers import AutoModelForCausalLM

        from deepspec_core.families.transformers_target import TransformersTarget

        model = AutoModelForCausalLM.from_config(self.text, dtype=dtype, attn_implementation="sdpa")
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
        """The target's text config in the draft's shape: `layers` layers of one kind, untied, with `extra` at the top
        level. `architectures` is None unless `extra` has it."""
        fields = self.shape.to_dict()
        for about_target in ("transformers_version", "_name_or_path", "quantization_config"):
            fields.pop(about_target, None)
        fields |= {"num_hidden_layers": layers, "tie_word_embeddings": False, "architectures": None}
        if hasattr(self.shape, "layer_types"):
            fields["layer_types"] = ["full_attention"] * layers
        return type(self.shape).from_dict(fields | self.window_fields(layers) | dict(extra))

    def window_fields(self, layers: int) -> dict[str, Any]:
        """The keys of config.json for the draft's window; none without a window. Engines read the family's own keys."""
        window = self.draft_layer.window
        if window is None:
            return {}
        if not self.slides_alike:
            return {DRAFT_WINDOW: window}
        fields = {"layer_types": [SLIDING] * layers, "sliding_window": window}
        return fields | ({"use_sliding_window": True} if hasattr(self.shape, "use_sliding_window") else {})

    def not_dense(self) -> str | None:
        """The part of the target's layers that a draft's layers cannot have, by its name in the config, or None."""
        return None

    def attention_heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads and head size of the draft's attention."""
        return self.shape.num_attention_heads, self.shape.num_key_value_heads, self.shape.head_dim

    def unsupported(self) -> str | None:
        """Why this target, or a draft in this shape, cannot be handled, or None."""
        unknown = MaskBuilder.unknown_types(self.text)
        if unknown:
            return f"the target has layers of type {', '.join(sorted(unknown))}"
        rotary = varying_rotary(self.text) or senseless_rotary(self.text)
        if rotary is not None:
            return rotary
        beyond = self.not_dense()
        if beyond is not None and self.draft_layer.intermediate_size is None:
            return f"drafts are dense, and the target has {beyond}: give intermediate_size in [draft.layer]"
        heads, kv_heads, head_dim = self.attention_heads()
        if heads % kv_heads:
            return f"the draft's {heads} attention heads cannot share {kv_heads} key-value heads evenly"
        if self.draft_layer.rope is not None:
            cos, _ = self.rotary()(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long))
            if cos.shape[-1] != head_dim:
                # Some releases take the head size of the target's sliding layers.
                size = cos.shape[-1]
                return f"[draft.layer] rope has angles of another size ({size}) than the draft's heads ({head_dim})"
        return None

    # What a family adds.

    @abstractmethod
    def conversation_format(self) -> ConversationFormat:
        """The markers of the assistant's answers, and the makers' recommended sampling."""

    @abstractmethod
    def attention_projections(self, in_features: int) -> AttentionProjections:
        """q, k, v, out and their norms in the draft's shape."""

    @abstractmethod
    def layer_norms(self) -> LayerNorms:
        """The norms around a layer."""

    @abstractmethod
    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """The family's norm over `size` (H) features."""

    @abstractmethod
    def mlp(self) -> nn.Module:
        """[..., H] -> [..., H]."""

    @abstractmethod
    def rotary(self) -> nn.Module:
        """(x, position_ids [B, T]) -> (cos, sin)."""


def head_dim_of(text: Any) -> int:
    """The head size of a text config; without a head_dim, the hidden size divided by the number of heads."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def tokens_of(text: Any) -> SpecialTokens:
    """The special ids in a config. Without a padding id, the first stop token is used, else 0."""
    stop = text.eos_token_id
    stop = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    pad = text.pad_token_id if text.pad_token_id is not None else next(iter(stop), 0)
    return SpecialTokens(stop=stop, pad=pad)
