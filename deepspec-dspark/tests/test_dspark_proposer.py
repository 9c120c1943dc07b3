"""Proposals: the same alone and in a batch, and as training sees the tokens that were drawn; ended by confidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attrs import evolve

from deepspec_core.blocks.published import load_draft
from deepspec_core.contracts.draft import DraftBatch, Sample
from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.registry import Registry
from deepspec_dspark.heads import RecurrentHead
from deepspec_dspark.model import DSparkModel
from deepspec_dspark.proposer import DSparkProposer

MakeModel, MakeSample, MakeBatch = Callable[..., DSparkModel], Callable[..., Sample], Callable[..., DraftBatch]
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0)
LENGTHS = [5, 9, 2, 7]
SHAPES = [
    {"head": "vanilla"},
    {"head": "gated"},
    {"head": "rnn"},
    {"head": "rnn", "anchor_predicts": False, "block_size": 5},
    {"head": "vanilla", "confidence_with_markov": False},
    {"head": "gated", "confidence_head": False},
    {"rank": 0, "confidence_with_markov": False},
]


@pytest.fixture
def samples(make_sample: MakeSample) -> list[Sample]:
    return [make_sample(str(i), 24, seed=i) for i in range(len(LENGTHS))]


def _propose(proposer: DSparkProposer, slots: list[int], samples: list[Sample], sampling: Sampling) -> Proposal:
    """A first round in fresh slots: prompts of the slots' LENGTHS, and the token after each as the anchor."""
    proposer.open_slots(4, 32)
    lengths = [LENGTHS[slot] for slot in slots]
    proposer.start(
        torch.tensor(slots),
        torch.stack([samples[slot].input_ids for slot in slots]),
        torch.tensor(lengths),
        torch.stack([samples[slot].input_ids[length] for slot, length in zip(slots, lengths, strict=True)]),
        torch.stack([samples[slot].features.hidden for slot in slots]),
    )
    uniforms = torch.rand(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[slots]
    return proposer.propose(torch.tensor(slots), torch.full((len(slots),), 9), sampling, uniforms, (1,))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_batched_equals_one_at_a_time(
    make_model: MakeModel, samples: list[Sample], sampling: Sampling, shape: dict[str, object]
) -> None:
    model = make_model(**shape)
    assert isinstance(model.proposer(), Proposer)
    together = _propose(model.proposer(), [0, 1, 2, 3], samples, sampling)
    assert together.lengths.tolist() == [4, 4, 4, 4]
    for slot in range(4):
        alone = _propose(model.proposer(), [slot], samples, sampling)
        assert torch.equal(alone.tokens[0], together.tokens[slot])
        for found, expected in (
            (alone.probabilities, together.probabilities),
            (alone.confidence, together.confidence),
        ):
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                torch.testing.assert_close(found[0], expected[slot], rtol=0, atol=1e-5)
    assert (together.probabilities is None) == (sampling is GREEDY)
    assert (together.confidence is None) == (shape.get("confidence_head") is False)


@pytest.mark.parametrize("shape", SHAPES)
def test_teacher_forcing_the_drawn_tokens_gives_what_drew_them(
    make_model: MakeModel, samples: list[Sample], make_batch: MakeBatch, shape: dict[str, object]
) -> None:
    """Block logits of training equal step-by-step logits of decoding, slot by slot, and confidences too."""
    model = make_model(**shape)
    for slot, sample in enumerate(samples):
        proposal = _propose(model.proposer(), [slot], samples, SAMPLED)
        anchor = LENGTHS[slot]
        drawn_ids = sample.input_ids.clone()
        drawn_ids[anchor + 1 : anchor + 5] = proposal.tokens[0]
        prepared = model.preparation.at(evolve(sample, input_ids=drawn_ids), torch.tensor([anchor]))
        rows = model(make_batch(model, [prepared]))
        assert rows.slot.tolist() == [0, 1, 2, 3]
        logits = model.logits(rows.hidden)
        if rows.correction is not None:
            correction = rows.correction @ model.heads().correction.T
            assert correction.std() > 0.3, "large enough to show where it is missing"
            logits = logits + correction
        torch.testing.assert_close(proposal.probabilities[0], logits.softmax(-1), rtol=0, atol=1e-5)
        if model.confidence_head is None:
            assert proposal.confidence is None
            assert not rows.extras
        else:
            torch.testing.assert_close(proposal.confidence[0], rows.extras["confidence_logits"], rtol=0, atol=1e-5)


def test_the_recurrent_state_runs_inside_one_block() -> None:
    torch.manual_seed(0)
    head = RecurrentHead(vocab_size=9, hidden_size=5, rank=3)
    hidden, embedded = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    state, stepwise = head.start(embedded[:, 0]), []
    for slot in range(4):
        correction, state = head.step(hidden[:, slot], embedded[:, slot], state)
        stepwise.append(correction)
    together = head(hidden, embedded)
    torch.testing.assert_close(together, torch.stack(stepwise, 1), rtol=0, atol=1e-6)
    embedded[0, 1] += 1.0
    changed = (head(hidden, embedded) - together).abs().amax(-1) > 1e-6
    assert changed.tolist() == [[False, True, True, True], [False] * 4]


def test_the_previous_token_matters_and_a_later_one_does_not(make_model: MakeModel, samples: list[Sample]) -> None:
    """With uniforms that differ in slot 1 only, slot 0 stays and later slots see another token before them."""
    model = make_model(head="rnn")
    proposer = model.proposer()
    first = _propose(proposer, [0], samples, SAMPLED)
    uniforms = torch.rand(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[:1]
    uniforms[0, 1] = (uniforms[0, 1] + 0.5) % 1.0
    second = proposer.propose(torch.tensor([0]), torch.tensor([4]), SAMPLED, uniforms, (1,))
    assert first.tokens[0, 0] == second.tokens[0, 0]
    assert first.tokens[0, 1] != second.tokens[0, 1]
    same = [torch.equal(first.probabilities[0, k], second.probabilities[0, k]) for k in range(4)]
    assert same == [True, True, False, False]
    # Confidence in a slot is known before its token is drawn, or ending a proposal there would bias the output.
    same = [torch.equal(first.confidence[0, k], second.confidence[0, k]) for k in range(3)]
    assert same == [True, True, False]


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_ended_proposals_leave_greedy_output_alone(
    family: str, parity: Path, registry: Registry, adapter: TargetAdapter, threshold: float
) -> None:
    folder = parity / f"{family}-decode-dspark"
    recorded = json.loads((folder / "case.json").read_text())
    samples = recorded["by_confidence_threshold"]["0.0"]["samples"][:3]
    model = load_draft(folder / "draft", registry=registry, adapter=adapter)
    completions = decode(
        adapter.load(parity / f"{family}-target", dtype=torch.float32, device="cpu"),
        model.proposer(),
        [Request(id=str(i), prompt_ids=tuple(s["prompt"]), seed=i) for i, s in enumerate(samples)],
        sampling=GREEDY,
        stop_ids=recorded["stop_token_ids"],
        max_new_tokens=12,
        batch_size=3,
        max_length=64,
        confidence_threshold=threshold,
    )
    for completion in completions:
        expected = recorded["target_greedy"][int(completion.id)][len(completion.prompt_ids) :][:12]
        assert list(completion.output_ids) == expected
        for one in completion.rounds:
            assert all(torch.tensor(one.confidence).sigmoid() >= threshold)
        if threshold == 1.0:
            assert {one.proposal_length for one in completion.rounds} == {0}
