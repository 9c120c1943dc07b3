"""[draft.layer]: the draft's own shape, where it is not the target's. Imports attrs only."""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import gt, optional

__all__ = ["LayerOptions"]


@frozen(kw_only=True)
class LayerOptions:
    """[draft.layer]: the draft's own shape. What is left out is the target's.

    intermediate_size: Width of the MLP. Needed for targets without dense layers.
    num_heads: Query heads.
    num_kv_heads: Key and value heads.
    head_dim: Size of a head.
    """

    intermediate_size: int | None = field(default=None, validator=optional(gt(0)))
    num_heads: int | None = field(default=None, validator=optional(gt(0)))
    num_kv_heads: int | None = field(default=None, validator=optional(gt(0)))
    head_dim: int | None = field(default=None, validator=optional(gt(0)))
