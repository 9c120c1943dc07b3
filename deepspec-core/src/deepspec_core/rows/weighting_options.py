"""Options of core's weightings, as run files write them. Imports attrs only."""

from __future__ import annotations

from attrs import field, frozen

from deepspec_core.config.bounds import above, real


@frozen(kw_only=True)
class DecayOptions:
    """[loss] weighting = {type = "decay", gamma = 4.0}: later slots of a block weigh less.

    gamma: A row in slot k weighs exp(-k / gamma). With less than 0.01, only slot 0 would weigh anything.
    """

    gamma: float = field(default=4.0, validator=real(0.01, 1e30))


@frozen(kw_only=True)
class DPaceOptions:
    """[loss] weighting = {type = "d-pace", alpha = 0.5}: rows weigh by the draft's own confidence in the labels.

    A confidence q counts as (1 - alpha) * q + alpha. With a small alpha, rows that come after one of which the draft is
    unsure weigh little.

    alpha: The share of confidence that is taken for granted. With 1 a row weighs the number of rows from it to the
        end of its block.
    """

    alpha: float = field(default=0.5, validator=above(0.0, 1.0))
