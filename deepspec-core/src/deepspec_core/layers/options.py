"""[draft.layer]: the draft's own shape, where it is not the target's. Imports attrs only."""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import gt, optional


@frozen(kw_only=True)
class LayerOptions:
    """[draft.layer]: the draft's own shape; what is left out is the target's."""

    intermediate_size: int | None = field(default=None, validator=optional(gt(0)))
    num_heads: int | None = field(default=None, validator=optional(gt(0)))
    num_kv_heads: int | None = field(default=None, validator=optional(gt(0)))
    head_dim: int | None = field(default=None, validator=optional(gt(0)))
