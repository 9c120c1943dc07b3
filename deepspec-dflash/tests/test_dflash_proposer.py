"""Proposals: the same alone and in a batch, incrementally and from scratch, cut to limits, drawn as stated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deepspec_core.contracts.draft import DraftBatch, Sample
from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.proposer import DFlashProposer

MakeSample = Callable[..., Sample]
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0)
LENGTHS = [5, 9, 2, 7]


@pytest.fixture
def model(make_model: Callable[..., DFlashModel]) -> DFlashModel:
    return make_model()


@pytest.fixture
def samples(make_sample: MakeSample) -> list[Sample]:
    return [make_sample(str(i), 24, seed=i) for i in range(len(LENGTHS))]


def _start(proposer: DFlashProposer, slots: list[int], samples: list[Sample], lengths: list[int]) -> None:
    """Prompts of these lengths; the token after them is the first one the target drew."""
    width = max(lengths)
    proposer.start(
        torch.tensor(slots),
        torch.stack([sample.input_ids[:width] for sample in samples]),
        torch.tensor(lengths),
        torch.stack([sample.input_ids[length] for sample, length in zip(samples, lengths, strict=True)]),
        torch.stack([sample.features.hidden[:width] for sample in samples if sample.features]),
    )


def _accept(
    proposer: DFlashProposer, slots: list[int], samples: list[Sample], starts: list[int], counts: list[int]
) -> None:
    width = max(counts) + 1
    windows = [slice(start, start + width) for start in starts]
    proposer.accept(
        torch.tensor(slots),
        torch.stack([s.input_ids[w.start + 1 : w.stop + 1] for s, w in zip(samples, windows, strict=True)]),
        torch.tensor(counts),
        torch.stack([s.features.hidden[w] for s, w in zip(samples, windows, strict=True) if s.features]),
    )


def _propose(
    proposer: DFlashProposer, slots: list[int], sampling: Sampling = GREEDY, limits: list[int] | None = None
) -> Proposal:
    uniforms = torch.rand(16, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[slots]
    chosen = torch.tensor([4] * len(slots) if limits is None else limits)
    return proposer.propose(torch.tensor(slots), chosen, sampling, uniforms, (1,))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_batched_equals_one_at_a_time(model: DFlashModel, samples: list[Sample], sampling: Sampling) -> None:
    together = model.proposer()
    assert isinstance(together, Proposer)
    together.open_slots(4, 32)
    _start(together, [0, 1, 2, 3], samples, LENGTHS)
    first = _propose(together, [0, 1, 2, 3], sampling)
    _accept(together, [0, 1, 3], [samples[0], samples[1], samples[3]], [5, 9, 7], [3, 1, 5])
    second = _propose(together, [0, 1, 3], sampling)
    for row, slot in enumerate([0, 1, 3]):
        alone = model.proposer()
        alone.open_slots(4, 32)
        _start(alone, [slot], [samples[slot]], [LENGTHS[slot]])
        assert torch.equal(_propose(alone, [slot], sampling).tokens[0], first.tokens[slot])
        _accept(alone, [slot], [samples[slot]], [LENGTHS[slot]], [[3, 1, 5][row]])
        found = _propose(alone, [slot], sampling)
        assert torch.equal(found.tokens[0], second.tokens[row])
        if sampling is SAMPLED:
            assert found.probabilities is not None
            assert second.probabilities is not None
            torch.testing.assert_close(found.probabilities[0], second.probabilities[row], rtol=0, atol=1e-6)


def test_decoding_sees_what_training_sees(
    model: DFlashModel, samples: list[Sample], make_batch: Callable[..., DraftBatch]
) -> None:
    """A block proposed after several rounds has the distributions that training gives the same anchor."""
    proposer = model.proposer()
    proposer.open_slots(1, 32)
    _start(proposer, [0], samples[:1], [5])
    _accept(proposer, [0], samples[:1], [5], [3])
    _accept(proposer, [0], samples[:1], [8], [1])
    proposal = _propose(proposer, [0], SAMPLED)
    rows = model(make_batch(model, [model.preparation.at(samples[0], torch.tensor([9]))]))
    torch.testing.assert_close(proposal.probabilities[0], model.logits(rows.hidden).softmax(-1), rtol=0, atol=1e-6)


def test_limits_cut_the_proposal_not_the_block(model: DFlashModel, samples: list[Sample]) -> None:
    proposer = model.proposer()
    proposer.open_slots(2, 32)
    _start(proposer, [0, 1], samples[:2], [5, 9])
    full = _propose(proposer, [0, 1])
    cut = _propose(proposer, [0, 1], limits=[0, 3])
    assert full.lengths.tolist() == [4, 4]
    assert cut.lengths.tolist() == [0, 3]
    assert torch.equal(cut.tokens[1, :3], full.tokens[1, :3])
    assert full.probabilities is None
    assert _propose(proposer, [0, 1], limits=[9, 9]).lengths.tolist() == [4, 4]


def test_a_reused_slot_remembers_nothing(model: DFlashModel, samples: list[Sample]) -> None:
    fresh, used = model.proposer(), model.proposer()
    for proposer in (fresh, used):
        proposer.open_slots(2, 32)
    _start(used, [0, 1], samples[:2], [20, 21])
    used.free(torch.tensor([1]))
    _start(used, [1], samples[2:3], [3])
    _start(fresh, [1], samples[2:3], [3])
    expected, found = _propose(fresh, [1], SAMPLED), _propose(used, [1], SAMPLED)
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=0, atol=1e-6)
    assert torch.equal(found.tokens, expected.tokens)


def test_draws_follow_the_stated_distribution(model: DFlashModel, samples: list[Sample]) -> None:
    proposer = model.proposer()
    proposer.open_slots(1, 32)
    _start(proposer, [0], samples[:1], [5])
    uniforms = torch.rand(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampling = Sampling(temperature=2.0, top_k=5)
    drawn = [proposer.propose(torch.tensor([0]), torch.tensor([4]), sampling, one[None], (1,)) for one in uniforms]
    probabilities = drawn[0].probabilities
    assert probabilities is not None
    assert ((probabilities > 0).sum(-1) == 5).all()
    tokens = torch.cat([proposal.tokens for proposal in drawn])
    for slot in range(4):
        seen = torch.bincount(tokens[:, slot], minlength=64) / len(uniforms)
        assert (seen - probabilities[0, slot]).abs().max() < 0.1
        assert (probabilities[0, slot][tokens[:, slot]] > 0).all()
