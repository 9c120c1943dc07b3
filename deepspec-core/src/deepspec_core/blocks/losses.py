"""Core's loss terms. A term knows one row's statistics; not weights, blocks, coefficients nor reduction.

Legend: N rows of a chunk, V vocabulary.
"""

from __future__ import annotations

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
    """-sum over V of softmax(target) * log softmax(draft), [N]: cross-entropy at the target's whole distribution."""

    needs_target = True
    needs_extras: tuple[str, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        return stats.soft_ce


class KL:
    """KL(target || draft), [N]: the soft cross-entropy less the target's entropy, so the gradient is the same."""

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


class Confidence:
    """Binary cross-entropy of the survival logit the rows carry (`confidence_logits`) with the row's acceptance, [N].

    The acceptance 1 - tv / 2 is a label here, detached: draft and target are trained on by other terms.
    """

    needs_target = True
    needs_extras: tuple[str, ...] = ("confidence_logits",)

    def __call__(self, stats: RowStats) -> Tensor:
        logits_N = stats.extras["confidence_logits"].to(stats.acceptance.dtype)
        return F.binary_cross_entropy_with_logits(logits_N, stats.acceptance, reduction="none")
