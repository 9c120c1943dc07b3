"""Options of core's weightings, as run files write them. Imports attrs only."""

from __future__ import annotations

from attrs import field, frozen

from deepspec_core.config.bounds import above, real


@frozen(kw_only=True)
class DecayOptions:
    """[loss] weighting = {type = "decay", gamma = 4.0}: later slots of a block weigh less.

    gamma: A row in slot k has the weight exp(-k / gamma). Below 0.01, only slot 0 would have any weight.
    """

    gamma: float = field(default=4.0, validator=real(0.01, 1e30))


@frozen(kw_only=True)
class DPaceOptions:
    """[loss] weighting = {type = "d-pace", alpha = 0.5}: the weights of rows follow from the probabilities that the
    draft gives to the labels.

    A label's probability q enters as (1 - alpha) * q + alpha. With a small alpha, rows after a label that the draft
    finds improbable have little weight.

    alpha: How far each probability is raised towards 1. With 1, probabilities do not matter: a row's weight is the
        number of rows from it to the end of its block.
    """

    alpha: float = field(default=0.5, validator=above(0.0, 1.0))
