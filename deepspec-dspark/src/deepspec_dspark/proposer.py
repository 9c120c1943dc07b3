"""Decoding: DFlash's backbone pass, then tokens slot by slot, each slot's logits corrected by the token before it.

Legend: B slots in a call, K predictions of a block, H hidden size, V the target's vocabulary, D the draft's, r rank of
the correction.
"""

from __future__ import annotations

from typing import Protocol

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.sampling import draw_in_turn
from deepspec_dflash.proposer import BlockDraft, DFlashProposer
from deepspec_dspark.heads import MarkovHead


class CorrectedDraft(BlockDraft, Protocol):
    """What proposing needs beyond a block draft's: the head that corrects logits, and confidence in slots."""

    markov_head: MarkovHead | None

    def known_logits(self, hidden_H: Tensor) -> Tensor:
        """[..., H] -> [..., D]."""
        ...

    def spread(self, logits_D: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        ...

    def embed_previous(self, previous: Tensor) -> Tensor | None:
        """[...] -> [..., r], or None without a Markov head."""
        ...

    def confidence(self, hidden_H: Tensor, embedded_r: Tensor | None) -> Tensor | None:
        """[..., H] and [..., r] -> [...], or None without a confidence head."""
        ...


class DSparkProposer(DFlashProposer):
    """A contracts.proposer.Proposer."""

    model: CorrectedDraft

    def __init__(self, model: CorrectedDraft) -> None:
        super().__init__(model)

    def tokens(
        self, hidden_BKH: Tensor, last_B: Tensor, limits_B: Tensor, sampling: Sampling, uniforms_BK: Tensor
    ) -> Proposal:
        """Tokens left to right and the confidence in each; at once where there is no Markov head."""
        markov = self.model.markov_head
        if markov is None:
            proposal = super().tokens(hidden_BKH, last_B, limits_B, sampling, uniforms_BK)
        else:
            proposal = self._sequential(markov, hidden_BKH, last_B, limits_B, sampling, uniforms_BK)
        previous_BK = torch.cat([last_B[:, None], proposal.tokens[:, :-1]], dim=1)
        return evolve(proposal, confidence=self.model.confidence(hidden_BKH, self.model.embed_previous(previous_BK)))

    def _sequential(
        self,
        markov: MarkovHead,
        hidden_BKH: Tensor,
        last_B: Tensor,
        limits_B: Tensor,
        sampling: Sampling,
        uniforms_BK: Tensor,
    ) -> Proposal:
        base_BKD = self.model.known_logits(hidden_BKH)
        state_Br: Tensor | None = None

        def logits(slot: int, previous_B: Tensor) -> Tensor:
            nonlocal state_Br
            embedded_Br = markov.markov_w1(previous_B)
            state_Br = markov.start(embedded_Br) if state_Br is None else state_Br
            correction_Br, state_Br = markov.step(hidden_BKH[:, slot], embedded_Br, state_Br)
            return self.model.spread(base_BKD[:, slot] + markov.markov_w2(correction_Br))

        tokens_BK, q_BKV = draw_in_turn(logits, last_B, sampling, uniforms_BK[:, : self.max_tokens])
        return Proposal(tokens=tokens_BK, lengths=limits_B.clamp(max=self.max_tokens), probabilities=q_BKV)
