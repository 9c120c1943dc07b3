"""The selector's loss. Knows the candidates' tokens and scores. Does not know how they are computed.

Legend: N rows, C candidates.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy

from deepspec_core.contracts.loss import RowStats


class SelectorLoss:
    """Cross-entropy of the candidates' scores at the label, which is one of them."""

    needs_target = False
    needs_extras = ("selector_scores", "selector_tokens")

    def __call__(self, stats: RowStats) -> Tensor:
        """[N] fp32."""
        scores_NC, tokens_NC = (stats.extras[name] for name in self.needs_extras)
        label_N = (tokens_NC == stats.target_ids[:, None]).int().argmax(-1)
        return cross_entropy(scores_NC.float(), label_N, reduction="none")
