"""Proposals: alike alone and in a batch, incrementally and from scratch; cut to limits and stops; drawn as stated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attrs import evolve

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.testing.driven_proposer import (
    GREEDY,
    SAMPLED,
    DrivenProposer,
    check_batched_as_alone,
    check_reused_slot,
    prompts,
    started,
)
from deepspec_core.testing.random_batches import features_of, padded_batch, prepare
from deepspec_eagle3.model import Eagle3Model, Places

MakeModel = Callable[..., Eagle3Model]


@pytest.fixture
def model(make_model: MakeModel, family: str) -> Eagle3Model:
    return make_model(family=family)


@pytest.fixture
def driven(model: Eagle3Model) -> DrivenProposer:
    return started(model)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_batched_equals_one_at_a_time(make_model: MakeModel, sampling: Sampling, num_layers: int) -> None:
    check_batched_as_alone(make_model(num_layers=num_layers), sampling, limits=[4, 2, 4, 1])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_decoding_sees_what_training_sees(make_model: MakeModel, family: str, num_layers: int) -> None:
    """A proposal made after several rounds has the distributions training gives that index, whatever was rejected."""
    model = make_model(family=family, num_layers=num_layers)
    driven, known = started(model), prompts()[0][0]
    driven.propose([0], SAMPLED)  # rejected: leaves no trace
    driven.accept({0: 3})
    driven.propose([0], SAMPLED)
    driven.accept({0: 1})
    proposal = driven.propose([0], SAMPLED)
    assert proposal.probabilities is not None
    # The sequence as training would see it, had the target emitted what was proposed.
    ids = torch.cat([known.input_ids[:10], proposal.tokens[0]])
    sample = evolve(
        known,
        input_ids=ids,
        loss_mask=torch.ones(len(ids), dtype=torch.bool),
        features=TargetFeatures(hidden=features_of(known).hidden[:14], last_hidden=torch.zeros(14, 32)),
    )
    batch = padded_batch(model, prepare(model, [sample]))
    first, later = model.unroll(batch, Places.of(batch))
    at = batch.prepared["later_index"].tolist().index(8)
    logits = torch.stack([model.logits(model.drafter.norm(state)) for state in (first[0, 8], *(s[at] for s in later))])
    torch.testing.assert_close(proposal.probabilities[0], logits.softmax(-1), rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("freed", [True, False])
def test_a_reused_slot_remembers_nothing(model: Eagle3Model, freed: bool) -> None:
    check_reused_slot(model, freed=freed)


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


def test_random_numbers_are_the_engines_alone(driven: DrivenProposer) -> None:
    before = driven.propose([0], Sampling(temperature=3.0))
    state = torch.get_rng_state()
    assert torch.equal(driven.propose([0], Sampling(temperature=3.0)).tokens, before.tokens)
    assert torch.equal(torch.get_rng_state(), state)
