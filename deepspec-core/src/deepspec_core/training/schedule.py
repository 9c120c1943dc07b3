"""The learning rate of each step: linear warm-up, then a cosine to zero. Knows step numbers only."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, total_steps: int, warmup: float) -> float:
    """The rate of a zero-based step of `total_steps`.

    W = ceil(warmup * total_steps) steps are warm-up. For step < W the rate is peak * (step + 1) / W, so the first
    step's is not zero. Then it is peak * (1 + cos(pi * (step - W) / (total_steps - W))) / 2.
    """
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
