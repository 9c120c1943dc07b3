"""Decoding with trees: the most probable paths through a block's distributions, chosen without training.

A block has one distribution for each of its positions, which is the same after every path. Knows neither the target
nor how trees are verified.

Legend: B slots in a call, W nodes of a level, K predictions of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.best_first import NextTokens, best_first, log_probabilities
from deepspec_dflash.proposer import BlockDraft, DFlashProposer

__all__ = ["DFlashTreeProposer"]


class DFlashTreeProposer(DFlashProposer):
    """A contracts.proposer.Proposer of trees. Drafts whose distributions depend on the path replace `next_tokens`."""

    def __init__(self, model: BlockDraft, nodes: int) -> None:
        super().__init__(model)
        self.max_nodes = nodes

    def tokens(
        self, hidden_BKH: Tensor, last_B: Tensor, limits_B: Tensor, sampling: Sampling, uniforms_BK: Tensor
    ) -> Proposal:
        """The best tree of the block. Nothing is drawn."""
        next_tokens = self.next_tokens(hidden_BKH, last_B, sampling)
        return best_first(next_tokens, nodes=self.max_nodes, longest=self.max_tokens, limits=limits_B)

    def next_tokens(self, hidden_BKH: Tensor, last_B: Tensor, sampling: Sampling) -> NextTokens:
        """The block's distributions, whatever was chosen before."""
        probabilities_BKV = log_probabilities(self.model.logits(hidden_BKH), sampling)

        def given(level: int, tokens_BW: Tensor | None, parents_BW: Tensor | None) -> Tensor:
            return probabilities_BKV[:, level : level + 1]

        return given
