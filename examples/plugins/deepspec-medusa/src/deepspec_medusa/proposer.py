"""How Medusa heads propose: all tokens of a round at once, as a chain or as the best tree.

The heads read the target's last hidden state at the position before the last committed token. They do not read the
token itself.

Legend: S slots, B slots in a call, T tokens, K heads, H hidden size, C channels of features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.best_first import best_first, log_probabilities
from deepspec_core.decoding.sampling import draw_tokens

if TYPE_CHECKING:
    from deepspec_medusa.draft import MedusaDraft


class MedusaProposer:
    """A contracts.proposer.Proposer of chains."""

    taps: tuple[int, ...] = ()
    reads_last_hidden = True

    def __init__(self, draft: MedusaDraft) -> None:
        self.draft, self.max_tokens = draft, draft.options.num_heads

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Room for one hidden state a slot."""
        biases_KH = self.draft.biases_KH
        self.last_SH = biases_KH.new_zeros(num_slots, biases_KH.shape[1])

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """The state at the prompt's last token counts."""
        self._keep(slots, features, lengths)

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """The state before the last committed token counts."""
        self._keep(slots, features, committed)

    def _keep(self, slots_B: Tensor, features_BTC: Tensor, counts_B: Tensor) -> None:
        each_B = torch.arange(len(slots_B), device=counts_B.device)
        # The last hidden state stands behind the tapped layers.
        last_BH = features_BTC[each_B, counts_B - 1, -self.last_SH.shape[1] :]
        self.last_SH[slots_B] = last_BH.to(self.last_SH.dtype)

    @torch.no_grad()
    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """A token of every head."""
        return self.tokens(self.draft.logits(self.draft.hidden(self.last_SH[slots])), limits, sampling, uniforms)

    def tokens(self, logits_BKV: Tensor, limits_B: Tensor, sampling: Sampling, uniforms_BK: Tensor) -> Proposal:
        """A chain. Heads do not see each other's tokens, so the distributions drawn from are q whatever was drawn."""
        lengths_B = limits_B.clamp(max=self.max_tokens)
        tokens_BK, q_BKV = draw_tokens(logits_BKV, sampling, uniforms_BK)
        return Proposal(tokens=tokens_BK, lengths=lengths_B, probabilities=q_BKV)

    def free(self, slots: Tensor) -> None:
        """Nothing to forget: a slot's state is overwritten when it starts."""


class MedusaTreeProposer(MedusaProposer):
    """A proposer of trees, which consist of the most probable paths through the heads' distributions."""

    def __init__(self, draft: MedusaDraft, nodes: int) -> None:
        super().__init__(draft)
        self.max_nodes = nodes

    def tokens(self, logits_BKV: Tensor, limits_B: Tensor, sampling: Sampling, uniforms_BK: Tensor) -> Proposal:
        """The best tree. Nothing is drawn."""
        given_BKV = log_probabilities(logits_BKV, sampling)
        return best_first(
            lambda level, tokens_BW, parents_BW: given_BKV[:, level : level + 1],
            nodes=self.max_nodes,
            longest=self.max_tokens,
            limits=limits_B,
        )
