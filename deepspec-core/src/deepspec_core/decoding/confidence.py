"""Ending a proposal early, as at its first token of low confidence. Knows a proposal. Does not know proposers.

Legend: B slots, K draft tokens at most.
"""

from __future__ import annotations

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal
from deepspec_core.errors import ConfigError


def cut(proposal: Proposal, threshold: float) -> Proposal:
    """The tokens of the proposal before the first whose confidence, sigmoid(logit), is below `threshold`; perhaps none.

    Columns that no slot needs are dropped, so that the target does not score them. The output keeps the target's
    distribution, because a token's confidence depends only on the tokens before it. Raises ConfigError if the draft
    gives no confidence.
    """
    if proposal.confidence is None:
        raise ConfigError(
            "this draft gives no confidence to compare with",
            where="[evaluate] confidence_threshold",
            found=f"{threshold:g}",
            expected="a draft with a confidence head, or a threshold of 0",
        )
    sure_BK = (proposal.confidence.float().sigmoid() >= threshold).long()
    return shortened(proposal, torch.minimum(proposal.lengths, sure_BK.cumprod(1).sum(1)))


def shortened(proposal: Proposal, lengths_B: Tensor) -> Proposal:
    """The first lengths[b] tokens of each slot, if it proposes as many. Columns that no slot needs are dropped."""
    width = int(lengths_B.max())
    return evolve(
        proposal,
        tokens=proposal.tokens[:, :width],
        lengths=lengths_B,
        probabilities=None if proposal.probabilities is None else proposal.probabilities[:, :width],
        confidence=None if proposal.confidence is None else proposal.confidence[:, :width],
    )
