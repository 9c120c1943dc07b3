"""Decoding: DFlash's backbone pass, then a walk from the anchor through each slot's candidates.

A token is chosen or drawn from the candidates only. The proposal gives verification this distribution, spread over the
whole vocabulary. Does not know how the candidates are scored.

Legend: B slots in a call, K predictions of a block, W nodes of a level, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.best_first import NextTokens, log_probabilities
from deepspec_core.decoding.sampling import draw_in_turn
from deepspec_dflash.proposer import DFlashProposer
from deepspec_dflash.tree import DFlashTreeProposer

if TYPE_CHECKING:
    from deepspec_dflash2.draft import DFlash2Draft


class DFlash2Proposer(DFlashProposer):
    """A contracts.proposer.Proposer of chains."""

    model: DFlash2Draft

    def tokens(
        self, hidden_BKH: Tensor, last_B: Tensor, limits_B: Tensor, sampling: Sampling, uniforms_BK: Tensor
    ) -> Proposal:
        """Tokens left to right, each given the one before it."""
        given = self.model.walk(hidden_BKH)

        def logits(slot: int, previous_B: Tensor) -> Tensor:
            return given(slot, previous_B[:, None])[:, 0]

        tokens_BK, q_BKV = draw_in_turn(logits, last_B, sampling, uniforms_BK[:, : self.max_tokens])
        return Proposal(tokens=tokens_BK, lengths=limits_B.clamp(max=self.max_tokens), probabilities=q_BKV)


class DFlash2TreeProposer(DFlashTreeProposer):
    """A proposer of trees, which consist of the most probable walks."""

    model: DFlash2Draft

    def next_tokens(self, hidden_BKH: Tensor, last_B: Tensor, sampling: Sampling) -> NextTokens:
        """The distributions after each node."""
        given = self.model.walk(hidden_BKH)

        def after(level: int, tokens_BW: Tensor | None, parents_BW: Tensor | None) -> Tensor:
            return log_probabilities(given(level, last_B[:, None] if tokens_BW is None else tokens_BW), sampling)

        return after
