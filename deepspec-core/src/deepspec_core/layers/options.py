"""[draft.layer]: the draft's own shape, if it differs from the target's. Imports attrs and core's bounds only."""

from __future__ import annotations

from typing import Any, Final

from attrs import Attribute, field, frozen
from attrs.validators import optional

from deepspec_core.config.bounds import whole

__all__ = ["LayerOptions"]

_SIZES = 2**20
_HEADS = 2**12

# What a model's config.json calls these keys, and people write by habit.
CONFIG_NAMES: Final = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"}
# What each kind of rotary embedding needs to be told.
_ROPE_NEEDS: Final = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_ROPE_NUMBERS: Final = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
)
_MOST: Final = 1e15


def _rotary(_options: object, attribute: Attribute[Any], given: dict[str, float | str]) -> None:
    """Known names, finite positive numbers, and all that the kind needs."""
    for name, value in given.items():
        if name == "rope_type":
            if value not in _ROPE_NEEDS:
                raise ValueError(f"'{attribute.name}.rope_type' must be one of {', '.join(_ROPE_NEEDS)}: {value}")
        elif name not in _ROPE_NUMBERS:
            raise ValueError(f"'{attribute.name}' must have names among rope_type, {', '.join(_ROPE_NUMBERS)}: {name}")
        elif type(value) not in (int, float) or not 0 < float(value) <= _MOST:
            raise ValueError(f"'{attribute.name}.{name}' must be a number above 0: {value}")
    missing = [name for name in _ROPE_NEEDS.get(str(given.get("rope_type")), ()) if name not in given]
    if missing:
        raise ValueError(f"'{attribute.name}' must have {', '.join(missing)} for rope_type {given['rope_type']}")


@frozen(kw_only=True)
class LayerOptions:
    """[draft.layer]: the draft's own shape. What is left out is the target's.

    intermediate_size: Width of the MLP. Needed for targets without dense layers.
    num_heads: Query heads.
    num_kv_heads: Key and value heads.
    head_dim: Size of a head.
    rope: Parameters of the rotary embedding that differ from the target's, by the names that config.json has in
        `rope_parameters`, such as {rope_type = "yarn", factor = 4.0, original_max_position_embeddings = 32768}. With a
        `rope_type`, only the target's base (`rope_theta`) is kept.
    window: Positions that each of the draft's attention layers sees, its own included. Earlier ones are not seen, in
        training as in decoding, so the draft's decoding cost and cache stop growing with the context. It must be at
        least as large as what the draft proposes in one round. Left out: the whole context.
    """

    intermediate_size: int | None = field(default=None, validator=optional(whole(1, _SIZES)))
    num_heads: int | None = field(default=None, validator=optional(whole(1, _HEADS)))
    num_kv_heads: int | None = field(default=None, validator=optional(whole(1, _HEADS)))
    head_dim: int | None = field(default=None, validator=optional(whole(1, _SIZES)))
    rope: dict[str, float | str] | None = field(default=None, validator=optional(_rotary))
    window: int | None = field(default=None, validator=optional(whole(1, _SIZES)))
