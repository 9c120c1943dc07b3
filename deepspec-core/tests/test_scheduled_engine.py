"""The engine with scheduled proposals is lossless: greedy token for token, sampled in distribution; and a schedule that
looks ahead is not, which these tests find out."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

import deepspec_core.decoding.scheduled as scheduled_module
from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.decoding.scheduled import ScheduledProposer
from deepspec_core.decoding.scheduler import admit
from deepspec_core.errors import ConfigError
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.tiny_target import TinyTarget

VOCAB = 12


class JudgingProposer(TableProposer):
    """A table proposer whose confidence in a token depends on the token before it, and on nothing after."""

    def propose(self, slots: Tensor, *arguments: Any) -> Proposal:
        before_B1 = torch.tensor([[self.last[slot]] for slot in slots.tolist()])
        proposal = super().propose(slots, *arguments)
        before_BK = torch.cat([before_B1, proposal.tokens[:, :-1]], dim=1)
        return evolve(proposal, confidence=(before_BK * 5 % 7 - 2).float())


def speed(requests: int, tokens: int) -> float:
    return 1 / (1 + 0.02 * tokens + 0.2 * (tokens - requests) / requests)


def run(proposer: Any, *, temperature: float, count: int = 17, batch_size: int = 4, **more: Any) -> list[Completion]:
    target = TinyTarget(vocab_size=VOCAB, hidden_size=8, num_layers=2, seed=3)
    requests = [Request(id=str(i), prompt_ids=(2 + i % 9, 3), seed=i) for i in range(count)]
    settings = {"max_new_tokens": 20, "max_length": 64, "batch_size": batch_size, **more}
    found = decode(target, proposer, requests, sampling=Sampling(temperature=temperature), stop_ids=(1,), **settings)
    return sorted(found, key=lambda completion: int(completion.id))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_greedy_outputs_are_the_targets_own(batch_size: int, asynchronous: bool) -> None:
    plain = run(None, temperature=0.0, batch_size=batch_size)
    judging = JudgingProposer(vocab_size=VOCAB, max_tokens=4)
    found = run(ScheduledProposer(judging, speed, asynchronous=asynchronous), temperature=0.0, batch_size=batch_size)
    assert [one.output_ids for one in found] == [one.output_ids for one in plain]
    lengths = Counter(r.proposal_length for one in found for r in one.rounds)
    assert len(lengths) > 2, "proposals of several lengths"
    assert all(len(r.confidence or ()) == r.proposal_length for one in found for r in one.rounds)


def second_tokens(proposer: Any, *, first_seed: int) -> Counter[tuple[int, ...]]:
    target = TinyTarget(vocab_size=VOCAB, hidden_size=8, num_layers=2, seed=3)
    requests = [Request(id=str(i), prompt_ids=(3, 4), seed=first_seed + i) for i in range(4000)]
    found = decode(
        target, proposer, requests, sampling=Sampling(temperature=1.0), stop_ids=(1,), max_new_tokens=3,
        batch_size=500, max_length=8,
    )  # fmt: skip
    return Counter(completion.output_ids for completion in found)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_sampled_outputs_have_the_targets_distribution(asynchronous: bool) -> None:
    plain = second_tokens(None, first_seed=0)
    judging = JudgingProposer(vocab_size=VOCAB, max_tokens=3, seed=5)
    found = second_tokens(ScheduledProposer(judging, speed, asynchronous=asynchronous), first_seed=4000)
    keys = [key for key in plain | found if plain[key] + found[key] >= 20]
    chi_square = sum((plain[key] - found[key]) ** 2 / (plain[key] + found[key]) for key in keys)
    assert len(keys) > 30
    assert chi_square / (len(keys) - 1) < 1.35


A, B = 2, 3


class CoinTarget(TinyTarget):
    """Says A with probability 0.7 and B with 0.3, whatever came before."""

    def decode(self, *arguments: Any, **more: Any) -> Any:
        step = super().decode(*arguments, **more)
        logits = torch.full_like(step.logits, -torch.inf)
        logits[..., A], logits[..., B] = torch.tensor(0.7).log(), torch.tensor(0.3).log()
        return evolve(step, logits=logits)


class CoinProposer(TableProposer):
    """Proposes A or B with a half each. It is sure of its second token after A, and knows that it fails after B."""

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        tokens_BK = torch.where(uniforms[:, :2] < 0.5, A, B)
        probabilities = torch.zeros(len(slots), 2, VOCAB)
        probabilities[..., A] = probabilities[..., B] = 0.5
        second_B = torch.where(tokens_BK[:, 0] == A, 0.9, 1e-12)
        confidence_BK = torch.stack([torch.full_like(second_B, 0.8), second_B], dim=1).logit()
        return Proposal(
            tokens=tokens_BK, lengths=torch.full_like(limits, 2), probabilities=probabilities, confidence=confidence_BK
        )


def share_of_a(
    search: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, *, asynchronous: bool = False
) -> float:
    """Of the first token of a round, one request at a time, under the counterexample's costs."""
    monkeypatch.setattr(scheduled_module, "admit", search)
    costs = {1: 1.0, 2: 0.5, 3: 0.45}
    coin = CoinProposer(vocab_size=VOCAB, max_tokens=2)
    proposer = ScheduledProposer(coin, lambda _, tokens: costs[tokens], asynchronous=asynchronous)
    target = CoinTarget(vocab_size=VOCAB, hidden_size=8, num_layers=1, seed=3)
    requests = [Request(id=str(i), prompt_ids=(5,), seed=i) for i in range(1500)]
    found = decode(
        target, proposer, requests, sampling=Sampling(temperature=1.0), stop_ids=(1,), max_new_tokens=2,
        batch_size=1, max_length=8,
    )  # fmt: skip
    return sum(completion.output_ids[1] == A for completion in found) / len(requests)


@pytest.mark.slow
def test_the_counterexample_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within four standard errors of 0.7; a search that looks ahead is twelve away."""
    assert share_of_a(admit, monkeypatch) == pytest.approx(0.7, abs=0.048)
    assert share_of_a(partial(admit, early_stop=False), monkeypatch) == pytest.approx(0.85, abs=0.048)


@pytest.mark.slow
def test_the_asynchronous_form_in_the_counterexample(monkeypatch: pytest.MonkeyPatch) -> None:
    """It searches among all counts, and what it finds is of tokens that are long decided."""
    assert share_of_a(admit, monkeypatch, asynchronous=True) == pytest.approx(0.7, abs=0.048)


def test_a_draft_without_confidence_is_refused() -> None:
    with pytest.raises(ConfigError, match="gives no confidence to schedule by"):
        run(ScheduledProposer(TableProposer(vocab_size=VOCAB, max_tokens=2), speed), temperature=0.0)
