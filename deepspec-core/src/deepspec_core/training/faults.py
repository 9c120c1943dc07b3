"""Errors that end training: numbers that are not finite, and an epoch without anything to learn from.

Makes the errors. Does not know when they are checked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from deepspec_core.errors import TrainingError

_SHOWN_IDS: Final = 8


def not_finite(
    step: int, grad_norm: float, done: Sequence[tuple[Sequence[str], Tensor]], sums: Mapping[str, float]
) -> TrainingError:
    """The error of step `step`, counted from 0.

    done: The samples of each micro-batch by id, and its loss.
    sums: The step's sums by name. The error names those that are not finite, so that one term or the weighting shows.
    """
    culprits = [ids for ids, total in done if not bool(torch.isfinite(total))]
    ids = [name for names in culprits or [names for names, _ in done] for name in names]
    more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
    what = "loss" if culprits else "gradient"
    spoilt = [name for name, value in sums.items() if not math.isfinite(value)]
    return TrainingError(
        f"the {what} of step {step + 1} is not finite; the weights are still those of step {step}",
        where=f"samples {', '.join(ids[:_SHOWN_IDS])}{more}",
        found=f"gradient norm {grad_norm}" + (f"; not finite: {', '.join(spoilt)}" if spoilt else ""),
        fix="Look at these samples and their features. If they are sound, lower train.lr or train.clip_norm. Where the "
        "draft, a loss term or the weighting is a plugin's, look at what it computes for them.",
    )


def nothing_supervised(samples: int, counts: Mapping[str, int]) -> TrainingError:
    """The error of an epoch in which no row was supervised. `counts`: what preparation counted."""
    return TrainingError(
        "the draft has nothing to learn from: the weights of an epoch's rows add up to nothing",
        where=f"{samples} samples",
        found=", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count) or None,
        expected="supervised tokens that the draft can predict, and a weighting that gives some of them weight",
        fix="Raise data.max_length or data.min_supervised_tokens, or give longer answers. Where loss.weighting is a "
        "plugin's, look at the weights that it returns.",
    )
