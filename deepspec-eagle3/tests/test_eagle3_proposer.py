"""Proposals: alike alone and in a batch, incrementally and from scratch; cut to limits and stops; drawn as stated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.draft import DraftBatch, Sample
from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling
from deepspec_core.contracts.target import TargetFeatures
from deepspec_eagle3.model import Eagle3Model, Places
from deepspec_eagle3.proposer import Eagle3Proposer

MakeSample, MakeModel = Callable[..., Sample], Callable[..., Eagle3Model]
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0)
LENGTHS = [5, 9, 2, 7]


@pytest.fixture
def model(make_model: MakeModel, family: str) -> Eagle3Model:
    return make_model(family=family)


@pytest.fixture
def samples(make_sample: MakeSample) -> list[Sample]:
    return [make_sample(str(i), 24, seed=i) for i in range(len(LENGTHS))]


def _hidden(sample: Sample, window: slice) -> Tensor:
    assert sample.features is not None
    return sample.features.hidden[window]


def _start(proposer: Eagle3Proposer, slots: list[int], samples: list[Sample], lengths: list[int]) -> None:
    """Prompts of these lengths; the token after them is the first one the target drew."""
    width = slice(0, max(lengths))
    proposer.start(
        torch.tensor(slots),
        torch.stack([sample.input_ids[width] for sample in samples]),
        torch.tensor(lengths),
        torch.stack([sample.input_ids[length] for sample, length in zip(samples, lengths, strict=True)]),
        torch.stack([_hidden(sample, width) for sample in samples]),
    )


def _accept(
    proposer: Eagle3Proposer, slots: list[int], samples: list[Sample], starts: list[int], counts: list[int]
) -> None:
    """The sample's own tokens are committed; `starts` are the lengths before."""
    width = max(counts) + 1
    windows = [slice(start, start + width) for start in starts]
    proposer.accept(
        torch.tensor(slots),
        torch.stack([s.input_ids[w.start + 1 : w.stop + 1] for s, w in zip(samples, windows, strict=True)]),
        torch.tensor(counts),
        torch.stack([_hidden(s, w) for s, w in zip(samples, windows, strict=True)]),
    )


def _propose(
    proposer: Eagle3Proposer,
    slots: list[int],
    sampling: Sampling = GREEDY,
    limits: list[int] | None = None,
    stop_ids: tuple[int, ...] = (),
) -> Proposal:
    uniforms = torch.rand(16, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[slots]
    chosen = torch.tensor([4] * len(slots) if limits is None else limits)
    return proposer.propose(torch.tensor(slots), chosen, sampling, uniforms, stop_ids)


def _fresh(model: Eagle3Model, num_slots: int = 4) -> Eagle3Proposer:
    proposer = model.proposer()
    proposer.open_slots(num_slots, 32)
    return proposer


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_batched_equals_one_at_a_time(
    make_model: MakeModel, samples: list[Sample], sampling: Sampling, num_layers: int
) -> None:
    model = make_model(num_layers=num_layers)
    together = _fresh(model)
    assert isinstance(together, Proposer)
    _start(together, [0, 1, 2, 3], samples, LENGTHS)
    first = _propose(together, [0, 1, 2, 3], sampling, limits=[4, 2, 4, 1])
    _accept(together, [0, 1, 3], [samples[0], samples[1], samples[3]], [5, 9, 7], [3, 1, 5])
    second = _propose(together, [0, 1, 3], sampling)
    for row, slot in enumerate([0, 1, 3]):
        alone = _fresh(model)
        _start(alone, [slot], [samples[slot]], [LENGTHS[slot]])
        limit = int(first.lengths[slot])
        found = _propose(alone, [slot], sampling, limits=[limit])
        assert torch.equal(found.tokens[0], first.tokens[slot, :limit])
        _accept(alone, [slot], [samples[slot]], [LENGTHS[slot]], [[3, 1, 5][row]])
        found = _propose(alone, [slot], sampling)
        assert torch.equal(found.tokens[0], second.tokens[row])
        if sampling is SAMPLED:
            assert found.probabilities is not None
            assert second.probabilities is not None
            torch.testing.assert_close(found.probabilities[0], second.probabilities[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_decoding_sees_what_training_sees(
    make_model: MakeModel, samples: list[Sample], make_batch: Callable[..., DraftBatch], family: str, num_layers: int
) -> None:
    """A proposal made after several rounds has the distributions training gives that index, whatever was rejected."""
    model = make_model(family=family, num_layers=num_layers)
    proposer = _fresh(model, 1)
    _start(proposer, [0], samples[:1], [5])
    _propose(proposer, [0], SAMPLED)  # rejected: leaves no trace
    _accept(proposer, [0], samples[:1], [5], [3])
    _propose(proposer, [0], SAMPLED)
    _accept(proposer, [0], samples[:1], [8], [1])
    proposal = _propose(proposer, [0], SAMPLED)
    assert proposal.probabilities is not None
    # The sequence as training would see it, had the target emitted what was proposed.
    ids = torch.cat([samples[0].input_ids[:10], proposal.tokens[0]])
    assert samples[0].features is not None
    sample = evolve(
        samples[0],
        input_ids=ids,
        loss_mask=torch.ones(len(ids), dtype=torch.bool),
        features=TargetFeatures(hidden=_hidden(samples[0], slice(0, 14)), last_hidden=torch.zeros(14, 32)),
    )
    batch = make_batch(model, [sample])
    first, later = model.unroll(batch, Places.of(batch))
    at = batch.prepared["later_index"].tolist().index(8)
    logits = torch.stack([model.logits(model.drafter.norm(state)) for state in (first[0, 8], *(s[at] for s in later))])
    torch.testing.assert_close(proposal.probabilities[0], logits.softmax(-1), rtol=0, atol=1e-6)


def test_limits_cut_the_proposal(model: Eagle3Model, samples: list[Sample]) -> None:
    proposer = _fresh(model, 2)
    _start(proposer, [0, 1], samples[:2], [5, 9])
    full, cut = _propose(proposer, [0, 1]), _propose(proposer, [0, 1], limits=[0, 3])
    assert full.lengths.tolist() == [4, 4]
    assert cut.lengths.tolist() == [0, 3]
    assert torch.equal(cut.tokens[1, :3], full.tokens[1, :3])
    assert full.probabilities is None
    assert _propose(proposer, [0, 1], limits=[9, 9]).lengths.tolist() == [4, 4]
    nothing = _propose(proposer, [0, 1], SAMPLED, limits=[0, 0])
    assert (nothing.tokens.shape, nothing.lengths.tolist(), nothing.probabilities) == ((2, 0), [0, 0], None)


def test_a_stop_token_ends_the_proposal(model: Eagle3Model, samples: list[Sample]) -> None:
    proposer = _fresh(model, 2)
    _start(proposer, [0, 1], samples[:2], [5, 9])
    full = _propose(proposer, [0, 1])
    row, others = full.tokens[0].tolist(), full.tokens[1].tolist()
    stop = row[1]
    found = _propose(proposer, [0, 1], stop_ids=(stop,))
    expected = [tokens.index(stop) + 1 if stop in tokens else 4 for tokens in (row, others)]
    assert found.lengths.tolist() == expected
    assert expected[0] in (1, 2)
    for tokens, length, whole in zip(found.tokens.tolist(), expected, (row, others), strict=True):
        assert tokens[:length] == whole[:length]


@pytest.mark.parametrize("freed", [True, False])
def test_a_reused_slot_remembers_nothing(model: Eagle3Model, samples: list[Sample], freed: bool) -> None:
    fresh, used = _fresh(model, 2), _fresh(model, 2)
    _start(used, [0, 1], samples[:2], [20, 21])
    if freed:
        used.free(torch.tensor([1]))
    _start(used, [1], samples[2:3], [3])
    _start(fresh, [1], samples[2:3], [3])
    expected, found = _propose(fresh, [1], SAMPLED), _propose(used, [1], SAMPLED)
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=0, atol=1e-6)
    assert torch.equal(found.tokens, expected.tokens)


def test_a_prompt_of_one_token(model: Eagle3Model, samples: list[Sample]) -> None:
    proposer = _fresh(model, 1)
    _start(proposer, [0], samples[:1], [1])
    assert _propose(proposer, [0]).lengths.tolist() == [4]


def test_draws_follow_the_stated_distribution(make_model: MakeModel, samples: list[Sample]) -> None:
    """Many slots with one prompt: first tokens follow the first distribution, second ones the first token's."""
    model = make_model()
    proposer = _fresh(model, 400)
    _start(proposer, list(range(400)), samples[:1] * 400, [5] * 400)
    uniforms = torch.rand(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limits = torch.full((400,), 2)
    proposal = proposer.propose(torch.arange(400), limits, Sampling(temperature=2.0, top_k=3), uniforms, ())
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


def test_random_numbers_are_the_engines_alone(model: Eagle3Model, samples: list[Sample]) -> None:
    proposer = _fresh(model, 1)
    _start(proposer, [0], samples[:1], [5])
    before = _propose(proposer, [0], Sampling(temperature=3.0))
    state = torch.get_rng_state()
    assert torch.equal(_propose(proposer, [0], Sampling(temperature=3.0)).tokens, before.tokens)
    assert torch.equal(torch.get_rng_state(), state)
