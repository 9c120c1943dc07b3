"""Decoding with trees: the most probable paths, where each token's distribution is corrected by the path before it.

Legend: B slots in a call, W nodes of a level, K predictions of a block, H hidden size, D the draft's vocabulary,
r rank of the correction.
"""

from __future__ import annotations

from torch import Tensor

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.best_first import NextTokens, log_probabilities
from deepspec_dflash.tree import DFlashTreeProposer
from deepspec_dspark.proposer import CorrectedDraft


class DSparkTreeProposer(DFlashTreeProposer):
    """A contracts.proposer.Proposer of trees. They carry no confidence, which is about chains."""

    model: CorrectedDraft

    def __init__(self, model: CorrectedDraft, nodes: int) -> None:
        super().__init__(model, nodes)

    def next_tokens(self, hidden_BKH: Tensor, last_B: Tensor, sampling: Sampling) -> NextTokens:
        """The block's distributions, corrected by the Markov head for each path; as they are without such a head."""
        markov = self.model.markov_head
        if markov is None:
            return super().next_tokens(hidden_BKH, last_B, sampling)
        base_BKD = self.model.known_logits(hidden_BKH)
        state_BWr: Tensor | None = None

        def given(level: int, tokens_BW: Tensor | None, parents_BW: Tensor | None) -> Tensor:
            nonlocal state_BWr
            embedded_BWr = markov.markov_w1(last_B[:, None] if tokens_BW is None else tokens_BW)
            if state_BWr is None or parents_BW is None:
                state_BWr = markov.start(embedded_BWr)
            else:
                state_BWr = state_BWr.gather(1, parents_BW[..., None].expand_as(embedded_BWr))
            hidden_BWH = hidden_BKH[:, level, None].expand(-1, embedded_BWr.shape[1], -1)
            correction_BWr, state_BWr = markov.step(hidden_BWH, embedded_BWr, state_BWr)
            corrected_BWD: Tensor = base_BKD[:, level, None] + markov.markov_w2(correction_BWr)
            return log_probabilities(self.model.spread(corrected_BWD), sampling)

        return given
