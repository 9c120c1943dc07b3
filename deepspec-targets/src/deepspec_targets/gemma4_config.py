"""Both spellings of the gemma4 family's config: the sizes of full-attention layers moved between transformers versions.

The older (`global_head_dim`, `num_global_key_value_heads`) is what published drafts are written in; the newer has one
entry a layer (`per_layer_config`). Reads either with either version of transformers; writes the older. Knows nothing
else of the family.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_NEW = "per_layer_config"
_HEAD_DIM, _KV_HEADS = "global_head_dim", "num_global_key_value_heads"


def text_config(config: Any) -> Any:
    """The text part of `config`, rewritten where it has the newer spelling and transformers only knows the older."""
    text = config.get_text_config()
    overrides = vars(text).get(_NEW)  # where transformers knows it, it is a property instead
    if overrides is None:
        return text
    fields = {key: value for key, value in text.to_dict().items() if key != _NEW}
    first = text.layer_types.index("full_attention")
    full = {int(index): entry for index, entry in overrides.items()}.get(first, {})
    sizes = {_HEAD_DIM: full.get("head_dim", fields["head_dim"])}
    if text.attention_k_eq_v:
        sizes[_KV_HEADS] = full.get("num_key_value_heads", fields["num_key_value_heads"])
    return type(text).from_dict(fields | sizes)


def published_fields(text: Any) -> dict[str, Any]:
    """The fields of a text config in the older spelling, whichever it has in memory."""
    return _older(text, text.to_dict())


@cache
def published_class(config_class: Any) -> Any:
    """`config_class`, written to disk in the older spelling and without what transformers adds to the rope entries."""

    class PublishedConfig(config_class):  # type: ignore[misc]
        def to_dict(self) -> dict[str, Any]:
            return _older(self, super().to_dict())

        def to_diff_dict(self) -> dict[str, Any]:
            return _older(self, super().to_diff_dict())

    return PublishedConfig


def _older(text: Any, fields: dict[str, Any]) -> dict[str, Any]:
    if fields.pop(_NEW, None) is not None or _HEAD_DIM not in fields:
        full = text.per_layer_config["full_attention"]
        fields[_HEAD_DIM] = full.head_dim
        fields[_KV_HEADS] = full.num_key_value_heads if text.attention_k_eq_v else None
    rope = fields["rope_parameters"]
    fields["rope_parameters"] = {name: entry for name, entry in rope.items() if name.endswith("_attention")}
    return fields
