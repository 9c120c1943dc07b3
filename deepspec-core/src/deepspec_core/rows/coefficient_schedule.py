"""A loss term's coefficient that changes over training, as run files write it.

Knows optimizer steps. Does not know terms, or how many steps a run has. Imports attrs only.
"""

from __future__ import annotations

import math

from attrs import field, frozen
from attrs.validators import in_

from deepspec_core.config.bounds import real, whole

SHAPES = ("linear", "cosine")

coefficient = real(-1e6, 1e6)
"""An attrs validator: what a loss can be multiplied by and stay a number."""


@frozen(kw_only=True)
class CoefficientSchedule:
    """A coefficient that changes over training: [loss] terms = {tv = {start = 0.0, end = 0.9, steps = 2000}}.

    start: The coefficient before the change.
    end: The coefficient after the change.
    steps: The number of optimizer steps from `start` to `end`.
    after: The optimizer step at which the change begins; before it the coefficient is `start`.
    shape: The curve from `start` to `end`.
    """

    start: float = field(validator=coefficient)
    end: float = field(validator=coefficient)
    steps: int = field(validator=whole(1))
    after: int = field(default=0, validator=whole(0))
    shape: str = field(default="linear", validator=in_(SHAPES))

    def at(self, step: int) -> float:
        """The coefficient at optimizer step `step`, counted from 0, which is (1 - s) * start + s * end.

        With t = clamp((step - after) / steps, 0, 1), s = t for "linear" and s = (1 - cos(pi * t)) / 2 for "cosine".
        """
        share = min(max((step - self.after) / self.steps, 0.0), 1.0)
        if self.shape == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        return (1.0 - share) * self.start + share * self.end
