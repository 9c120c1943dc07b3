"""[draft.layer]: the draft's own shape, if it differs from the target's. Imports attrs and core's bounds only."""

from __future__ import annotations

from typing import Final

from attrs import field, frozen
from attrs.validators import optional

from deepspec_core.config.bounds import whole

__all__ = ["LayerOptions"]

_SIZES = 2**20
_HEADS = 2**12

# What a model's config.json calls these keys, and people write by habit.
CONFIG_NAMES: Final = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"}


@frozen(kw_only=True)
class LayerOptions:
    """[draft.layer]: the draft's own shape. What is left out is the target's.

    intermediate_size: Width of the MLP. Needed for targets without dense layers.
    num_heads: Query heads.
    num_kv_heads: Key and value heads.
    head_dim: Size of a head.
    """

    intermediate_size: int | None = field(default=None, validator=optional(whole(1, _SIZES)))
    num_heads: int | None = field(default=None, validator=optional(whole(1, _HEADS)))
    num_kv_heads: int | None = field(default=None, validator=optional(whole(1, _HEADS)))
    head_dim: int | None = field(default=None, validator=optional(whole(1, _SIZES)))
