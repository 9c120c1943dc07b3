"""Proposals: alike alone and in a batch, incrementally and from scratch; cut to limits and stops; drawn as stated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.testing.driven_proposer import (
    SAMPLED,
    DrivenProposer,
    prompts,
    started,
)
from deepspec_eagle3.model import Eagle3Model

MakeModel = Callable[..., Eagle3Model]


@pytest.fixture
def model(make_model: MakeModel, family: str) -> Eagle3Model:
    return make_model(family=family)


@pytest.fixture
def driven(model: Eagle3Model) -> DrivenProposer:
    return started(model)


def test_limits_cut_the_proposal(driven: DrivenProposer) -> None:
    full, cut = driven.propose([0, 1], limits=[4, 4]), driven.propose([0, 1], limits=[0, 3])
    assert full.lengths.tolist() == [4, 4]
    assert cut.lengths.tolist() == [0, 3]
    assert torch.equal(cut.tokens[1, :3], full.tokens[1, :3])
    assert full.probabilities is None
    assert driven.propose([0, 1], limits=[9, 9]).lengths.tolist() == [4, 4]
    nothing = driven.propose([0, 1], SAMPLED, limits=[0, 0])
    assert (nothing.tokens.shape, nothing.lengths.tolist(), nothing.probabilities) == ((2, 0), [0, 0], None)


def test_a_stop_token_ends_the_proposal(driven: DrivenProposer) -> None:
    row, others = driven.propose([0, 1]).tokens.tolist()
    stop = row[1]
    found = driven.propose([0, 1], stop_ids=(stop,))
    expected = [tokens.index(stop) + 1 if stop in tokens else 4 for tokens in (row, others)]
    assert found.lengths.tolist() == expected
    assert expected[0] in (1, 2)
    for tokens, length, whole in zip(found.tokens.tolist(), expected, (row, others), strict=True):
        assert tokens[:length] == whole[:length]


def test_a_prompt_of_one_token(driven: DrivenProposer) -> None:
    driven.start({2: (prompts()[0][0], 1)})
    assert driven.propose([2]).lengths.tolist() == [4]


def test_draws_follow_the_stated_distribution(make_model: MakeModel) -> None:
    """Many slots with one prompt: first tokens follow the first distribution, second ones the first token's."""
    driven = DrivenProposer(make_model(), num_slots=400)
    driven.start(dict.fromkeys(range(400), prompts()[0]))
    proposal = driven.propose(range(400), Sampling(temperature=2.0, top_k=3), limits=[2] * 400)
    probabilities, tokens = proposal.probabilities, proposal.tokens
    assert probabilities is not None
    assert probabilities.shape == (400, 2, 64)
    assert ((probabilities > 0).sum(-1) == 3).all()
    seen = torch.bincount(tokens[:, 0], minlength=64) / 400
    assert (seen - probabilities[0, 0]).abs().max() < 0.1
    common = int(seen.argmax())
    after = tokens[:, 0] == common
    spread = probabilities[after, 1]
    torch.testing.assert_close(spread, spread[:1].expand_as(spread), rtol=0, atol=1e-6)
    seen = torch.bincount(tokens[after, 1], minlength=64) / int(after.sum())
    assert (seen - spread[0]).abs().max() < 0.15
    different = probabilities[~after, 1]
    assert (different - spread[0]).abs().sum(-1).min() > 1e-3, "the second distribution hangs on the first token"
