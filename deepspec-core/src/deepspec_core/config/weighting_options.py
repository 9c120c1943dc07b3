"""Options of core's weightings, as run files write them. Imports attrs only."""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import gt


@frozen(kw_only=True)
class DecayOptions:
    """[loss] weighting = {type = "decay", gamma = 4.0}: row weight exp(-slot / gamma)."""

    gamma: float = field(default=4.0, validator=gt(0.0))
