"""Proposals: the same alone and in a batch, and as training sees the tokens that were drawn; ended by confidence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deepspec_core.testing.driven_proposer import SAMPLED, started
from deepspec_core.testing.recorded import Recordings
from deepspec_dspark.heads import RecurrentHead
from deepspec_dspark.model import DSparkModel

MakeModel = Callable[..., DSparkModel]
SHAPES = [
    {"head": "vanilla"},
    {"head": "gated"},
    {"head": "rnn"},
    {"head": "rnn", "anchor_predicts": False, "block_size": 5},
    {"head": "vanilla", "confidence_with_markov": False},
    {"head": "gated", "confidence_head": False},
    {"rank": 0, "confidence_with_markov": False},
]


def test_the_recurrent_state_runs_inside_one_block() -> None:
    torch.manual_seed(0)
    head = RecurrentHead(vocab_size=9, head_rows=9, hidden_size=5, rank=3)
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


def test_the_previous_token_matters_and_a_later_one_does_not(make_model: MakeModel) -> None:
    """With uniforms that differ in slot 1 only, slot 0 stays and later slots see another token before them."""
    driven = started(make_model(head="rnn"))
    first = driven.propose([0], SAMPLED)
    driven.uniforms[0, 1] = (driven.uniforms[0, 1] + 0.5) % 1.0
    second = driven.propose([0], SAMPLED)
    assert first.tokens[0, 0] == second.tokens[0, 0]
    assert first.tokens[0, 1] != second.tokens[0, 1]
    same = [torch.allclose(first.probabilities[0, k], second.probabilities[0, k], atol=1e-6) for k in range(4)]
    assert same == [True, True, False, False]
    # Confidence in a slot is known before its token is drawn, or ending a proposal there would bias the output.
    same = [torch.allclose(first.confidence[0, k], second.confidence[0, k], atol=1e-6) for k in range(3)]
    assert same == [True, True, False]


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_ended_proposals_leave_greedy_output_alone(recordings: Recordings, family: str, threshold: float) -> None:
    case = recordings.decoding(f"{family}-decode-dspark")
    completions = case.replay(batch_size=3, threshold=threshold, max_new_tokens=12)
    for completion, greedy in zip(completions, case.record["target_greedy"], strict=True):
        assert list(completion.output_ids) == greedy[len(completion.prompt_ids) :][:12]
    rounds = [one for completion in completions for one in completion.rounds]
    assert all((torch.tensor(one.confidence).sigmoid() >= threshold).all() for one in rounds)
    if threshold == 1.0:
        assert {one.proposal_length for one in rounds} == {0}
