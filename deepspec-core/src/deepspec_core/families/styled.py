"""A draft whose layers are another family's than its target's: `[draft.layer] style`.

Knows how the sizes of one text config are transferred to another family's. The target is loaded and run by its own
adapter. Projections, norms, MLP, rotary embedding and config.json are those of the style. So are the embedding of
tokens (with the target's weights, but without a scale that only the target's family has) and the soft cap of logits,
because that is what an engine's draft of that family computes. A checkpoint is therefore an ordinary one of the style's
family. Knows no family by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from attrs import evolve
from torch import nn

from deepspec_core.contracts.target import (
    AttentionProjections,
    ConversationFormat,
    LayerNorms,
    SpecialTokens,
    TargetAdapter,
    TargetModel,
    TargetVocabulary,
)
from deepspec_core.families.rotary_kinds import with_rope
from deepspec_core.layers.options import ROPE_READS, LayerOptions

if TYPE_CHECKING:
    from deepspec_core.plugins.registry import Registry

__all__ = ["TARGET_FAMILY", "StyledAdapter", "styled_adapter"]

TARGET_FAMILY: Final = "target_model_type"
"""The key of a draft's config.json with the target's family, if the draft's layers are of another family."""
# What configs of all families call alike, and a draft shares with its target.
_SHARED: Final = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def styled_adapter(
    target: TargetAdapter, config: Any, layer: LayerOptions, tokens: SpecialTokens | None, *, registry: Registry
) -> StyledAdapter:
    """`target`'s adapter with the layers of the family `layer.style`. `config` is the target's transformers config.

    PluginError where no such family is installed, TargetError where it cannot have these sizes.
    """
    from transformers import AutoConfig

    assert layer.style is not None
    spec = registry.get("target", layer.style)
    text = config.get_text_config()
    kind = AutoConfig.for_model(spec.model_types[0]).get_text_config()
    fields = {name: getattr(text, name) for name in _SHARED if getattr(text, name, None) is not None}
    rope = _as_rope(getattr(text, "rope_parameters", None))
    if rope and getattr(kind, "rope_parameters", None):
        fields["rope_parameters"] = with_rope(kind.rope_parameters, rope)
    own = type(kind).from_dict({**_of_any_depth(kind), **fields})
    with torch.device("meta"):
        heads = target.attention_projections(target.architecture.hidden_size)
    sizes = {
        "intermediate_size": text.intermediate_size,
        "num_heads": heads.num_heads,
        "num_kv_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
    }
    given = {name: getattr(layer, name) for name in sizes if getattr(layer, name) is not None}
    shape = evolve(layer, style=None, **(sizes | given))
    style: TargetAdapter = registry.load("target", spec.name)(own, shape, tokens)
    return StyledAdapter(target, style)


def _of_any_depth(kind: Any) -> dict[str, Any]:
    """A new config's keys, without those that have an entry for each layer: the config makes them itself."""
    by_layer = ("layer_types", "per_layer_config", "transformers_version")
    return {name: value for name, value in kind.to_dict().items() if name not in by_layer}


def _as_rope(entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of a target's rotary embedding another family's can have: its base, and its stretching where it is one."""
    if entry is None:
        return {}
    entry = entry.get("full_attention", entry)
    kind = entry.get("rope_type", "default")
    read = ROPE_READS.get(kind, ("rope_theta",))
    kept = {name: entry[name] for name in read if entry.get(name) is not None}
    return kept if kind == "default" or kind not in ROPE_READS else {"rope_type": kind, **kept}


class StyledAdapter:
    """A contracts.target.TargetAdapter: `target` opens the target, `style` builds the draft.

    `architecture` is the target's, but for the soft cap of the draft's logits.
    """

    def __init__(self, target: TargetAdapter, style: TargetAdapter) -> None:
        self.target, self.style = target, style
        self.class_prefix = style.class_prefix
        self.architecture = evolve(target.architecture, draft_softcap=style.architecture.logit_softcap)

    def load(
        self, where: str | Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool = False
    ) -> TargetModel:
        """The target, by its own family."""
        return self.target.load(where, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    def vocabulary(
        self, where: str | Path, *, dtype: torch.dtype, device: torch.device | str
    ) -> TargetVocabulary | None:
        """The target's embedding and lm_head alone, if its own family can read them apart."""
        read = getattr(self.target, "vocabulary", None)
        found: TargetVocabulary | None = None if read is None else read(where, dtype=dtype, device=device)
        return found

    def final_norm(self, where: str | Path) -> nn.Module | None:
        """The target's last norm alone, if its own family can read it apart."""
        read = getattr(self.target, "final_norm", None)
        found: nn.Module | None = None if read is None else read(where)
        return found

    def skeleton(self, *, dtype: torch.dtype) -> TargetModel:
        """The target's modules, by its own family."""
        return self.target.skeleton(dtype=dtype)

    def conversation_format(self) -> ConversationFormat:
        """The target's."""
        return self.target.conversation_format()

    def attention_projections(self, in_features: int) -> AttentionProjections:
        """The style's."""
        return self.style.attention_projections(in_features)

    def layer_norms(self) -> LayerNorms:
        """The style's."""
        return self.style.layer_norms()

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """The style's."""
        return self.style.norm(size, scale=scale)

    def mlp(self) -> nn.Module:
        """The style's."""
        return self.style.mlp()

    def rotary(self) -> nn.Module:
        """The style's."""
        return self.style.rotary()

    def embedding(self) -> nn.Module:
        """The style's: it holds the target's weights, and scales them as the style does."""
        return self.style.embedding()

    def draft_config(self, layers: int, extra: Mapping[str, Any]) -> Any:
        """The style's, with the target's family beside it."""
        return self.style.draft_config(layers, {TARGET_FAMILY: self.target.architecture.model_type, **extra})

    def unsupported(self) -> str | None:
        """Why the target, or a draft of the style in this shape, cannot be handled, or None."""
        return self.target.unsupported() or self.style.unsupported()
