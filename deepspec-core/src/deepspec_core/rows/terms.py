"""Core's loss terms. A term knows the statistics of a row. It does not know weights, blocks, coefficients or reduction.

Legend: N rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deepspec_core.contracts.loss import RowStats


class CrossEntropy:
    """-log softmax(draft)[label], [N]."""

    needs_target = False
    needs_extras: tuple[str, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        return stats.ce


class SoftCrossEntropy:
    """-sum over V of softmax(target) * log softmax(draft), [N]: cross-entropy under the target's distribution."""

    needs_target = True
    needs_extras: tuple[str, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        return stats.soft_ce


class KL:
    """KL(target || draft), [N]: the soft cross-entropy minus the target's entropy. Both have the same gradient."""

    needs_target = True
    needs_extras: tuple[str, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        return stats.kl


class TotalVariation:
    """sum over V of |softmax(draft) - softmax(target)|, [N], between 0 and 2 (twice the total variation distance)."""

    needs_target = True
    needs_extras: tuple[str, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        return stats.tv


class NegativeLogAcceptance:
    """-log sum over V of min(softmax(draft), softmax(target)), [N]: the negative log of the acceptance rate.

    Its gradient is that of the negative acceptance rate, divided by the rate. So rows that are hardly ever accepted
    still count. A rate below the smallest normal number of its dtype counts as that number and has no gradient.
    """

    needs_target = True
    needs_extras: tuple[str, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        rate_N = stats.overlap.clamp(min=torch.finfo(stats.overlap.dtype).tiny)
        if rate_N.requires_grad:
            # 1 / tiny overflows when a row's weight times the coefficient is 4 or more.
            rate_N.register_hook(_finite)  # type: ignore[no-untyped-call,unused-ignore]
        return -rate_N.log()


class Confidence:
    """Binary cross-entropy between the rows' logits of confidence (`confidence_logits`) and the acceptance rate, [N].

    The acceptance rate 1 - tv / 2 is a label here and gets no gradient. Other terms train the draft's distribution.
    """

    needs_target = True
    needs_extras: tuple[str, ...] = ("confidence_logits",)

    def __call__(self, stats: RowStats) -> Tensor:
        logits_N = stats.extras["confidence_logits"].to(stats.acceptance.dtype)
        return F.binary_cross_entropy_with_logits(logits_N, stats.acceptance, reduction="none")


def _finite(gradient: Tensor | None) -> Tensor | None:
    """The gradient with infinities replaced by the largest number. None is autograd's undefined gradient."""
    if gradient is None:
        return None
    limits = torch.finfo(gradient.dtype)
    return gradient.clamp(limits.min, limits.max)
