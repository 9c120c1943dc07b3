"""A proposer whose confidences are scaled by temperatures. It proposes what the wrapped one proposes.

Only the confidences change, so nothing changes in the output unless something cuts proposals by them. Knows proposals.
Does not know how temperatures are fitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling, reads_last_hidden


class CalibratedProposer:
    """Divides the confidence logit of the k-th token by temperatures[k]. There is one for each of max_tokens."""

    def __init__(self, proposer: Proposer, temperatures: Sequence[float]) -> None:
        assert len(temperatures) == proposer.max_tokens, "a calibration of another draft"
        self.proposer, self.temperatures = proposer, tuple(temperatures)
        self.max_tokens, self.taps = proposer.max_tokens, proposer.taps
        self.max_nodes = getattr(proposer, "max_nodes", proposer.max_tokens)
        self.reads_last_hidden = reads_last_hidden(proposer)

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """As the wrapped proposer does."""
        self.proposer.open_slots(num_slots, max_length)

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """As the wrapped proposer does."""
        self.proposer.start(slots, prompt_ids, lengths, first_token, features)

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """The wrapped proposer's proposal with scaled confidences."""
        proposal = self.proposer.propose(slots, limits, sampling, uniforms, stop_ids)
        if proposal.confidence is None:
            return proposal
        scale_K = torch.tensor(self.temperatures[: proposal.confidence.shape[1]], device=proposal.confidence.device)
        return evolve(proposal, confidence=proposal.confidence.float() / scale_K)

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """As the wrapped proposer does."""
        self.proposer.accept(slots, committed_ids, committed, features)

    def free(self, slots: Tensor) -> None:
        """As the wrapped proposer does."""
        self.proposer.free(slots)
