"""The squared Hellinger distance: H^2(p, q) = 1 - sum over V of sqrt(p * q), between 0 and 1.

It is smoother than total variation where the two distributions nearly agree. Unlike the Kullback-Leibler divergence, it
is bounded. Knows two distributions. Does not know drafts or targets.

Legend: N rows of a chunk, V vocabulary.
"""

from torch import Tensor

from deepspec_core.contracts.loss import RowStats


class Hellinger:
    """contracts.loss.LossTerm."""

    needs_target = True
    needs_logits = True  # the statistics rows come with do not have it
    needs_extras: tuple[str, ...] = ()

    def __call__(self, stats: RowStats) -> Tensor:
        """[N], differentiable in the draft's logits."""
        # sqrt of a softmax, in logs: no square root of a probability that rounded to zero.
        draft_NV = stats.draft_logits.log_softmax(-1)
        target_NV = stats.target_logits.log_softmax(-1)
        return 1 - ((draft_NV + target_NV) / 2).exp().sum(-1)
