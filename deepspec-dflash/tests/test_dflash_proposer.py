"""Proposals: the same alone and in a batch, incrementally and from scratch, cut to limits, drawn as stated."""

from __future__ import annotations

import torch

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.testing.driven_proposer import (
    DrivenProposer,
    prompts,
    started,
)
from deepspec_dflash.model import DFlashModel


def test_limits_cut_the_proposal_not_the_block(model: DFlashModel) -> None:
    driven = started(model)
    full = driven.propose([0, 1], limits=[4, 4], stop_ids=(1,))
    cut = driven.propose([0, 1], limits=[0, 3])
    assert full.lengths.tolist() == [4, 4]
    assert cut.lengths.tolist() == [0, 3]
    assert torch.equal(cut.tokens[1, :3], full.tokens[1, :3])
    assert full.probabilities is None
    assert driven.propose([0, 1], limits=[9, 9]).lengths.tolist() == [4, 4]


def test_draws_follow_the_stated_distribution(model: DFlashModel) -> None:
    """Many slots with one prompt."""
    driven = DrivenProposer(model, num_slots=500)
    driven.start(dict.fromkeys(range(500), prompts()[0]))
    proposal = driven.propose(range(500), Sampling(temperature=2.0, top_k=5))
    tokens, probabilities = proposal.tokens, proposal.probabilities
    assert probabilities is not None
    assert ((probabilities > 0).sum(-1) == 5).all()
    for slot in range(4):
        seen = torch.bincount(tokens[:, slot], minlength=64) / 500
        assert (seen - probabilities[0, slot]).abs().max() < 0.1
        assert (probabilities[0, slot][tokens[:, slot]] > 0).all()
