"""The engine over a tiny random target: losslessness, independence of neighbours, stop tokens, the end of a run."""

from collections import Counter

import pytest
import torch

import deepspec_core.decoding.engine as engine_module
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Clock, Completion, Request, decode
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.tiny_target import TinyTarget

VOCAB = 12


def _requests(count: int) -> list[Request]:
    return [
        Request(id=str(i), prompt_ids=tuple((7 * i + j) % (VOCAB - 2) + 2 for j in range(2 + i % 5)), seed=i)
        for i in range(count)
    ]


def _decode(requests: list[Request], *, proposer: TableProposer | None, temperature: float, **options: int):
    target = TinyTarget(vocab_size=VOCAB, hidden_size=8, num_layers=2, seed=3)
    settings = {"max_new_tokens": 20, "batch_size": 4, "max_length": 64, **options}
    found = decode(target, proposer, requests, sampling=Sampling(temperature=temperature), stop_ids=(1,), **settings)
    return {completion.id: completion for completion in found}


def _outputs(found: dict[str, Completion]) -> dict[str, tuple[int, ...]]:
    return {identifier: completion.output_ids for identifier, completion in found.items()}


@pytest.mark.parametrize("stop_short", [False, True])
def test_greedy_speculation_equals_plain_greedy(stop_short: bool) -> None:
    requests = _requests(17)
    plain = _decode(requests, proposer=None, temperature=0.0)
    proposer = TableProposer(vocab_size=VOCAB, max_tokens=4, stop_short=stop_short)
    fast = _decode(requests, proposer=proposer, temperature=0.0)
    assert _outputs(fast) == _outputs(plain)
    assert len(plain) == 17
    assert {completion.finish_reason for completion in plain.values()} == {"stop", "length"}


def test_plain_decoding_makes_no_token_that_is_cut_off() -> None:
    found = _decode(_requests(9), proposer=None, temperature=0.0)
    assert any(one.finish_reason == "length" for one in found.values())
    # The first token of each comes with its prompt.
    assert all(len(one.rounds) == len(one.output_ids) - 1 for one in found.values())


def test_gradients_are_the_caller_s_between_completions() -> None:
    target = TinyTarget(vocab_size=VOCAB, hidden_size=8, num_layers=2, seed=3)
    sampling = Sampling(temperature=0.0)
    found = decode(
        target, None, _requests(3), sampling=sampling, stop_ids=(1,), max_new_tokens=4, batch_size=1, max_length=64
    )
    next(found)
    # Whoever stops here, for an error say, goes on with gradients on.
    assert torch.is_grad_enabled()
    next(found)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("with_proposer", [False, True])
def test_a_sample_does_not_depend_on_its_neighbours(with_proposer: bool) -> None:
    requests = _requests(9)

    def proposer() -> TableProposer | None:
        return TableProposer(vocab_size=VOCAB, max_tokens=3) if with_proposer else None

    together = _decode(requests, proposer=proposer(), temperature=1.0, batch_size=5)
    alone = {}
    for request in reversed(requests):
        alone |= _decode([request], proposer=proposer(), temperature=1.0, batch_size=1)
    assert _outputs(together) == _outputs(alone)


def _first_tokens(proposer: TableProposer | None, draws: int) -> Counter[tuple[int, ...]]:
    prompt = (3, 4)
    first_seed = 0 if proposer is None else draws
    requests = [Request(id=str(i), prompt_ids=prompt, seed=first_seed + i) for i in range(draws)]
    found = _decode(requests, proposer=proposer, temperature=1.0, max_new_tokens=3, batch_size=500, max_length=8)
    return Counter(completion.output_ids for completion in found.values())


def _chi_square_per_degree(observed: Counter[tuple[int, ...]], expected: Counter[tuple[int, ...]]) -> float:
    """Two-sample chi-square over sequences common enough to count, per degree of freedom: 1 when both are alike."""
    keys = [key for key in expected | observed if observed[key] + expected[key] >= 20]
    total = sum((observed[key] - expected[key]) ** 2 / (observed[key] + expected[key]) for key in keys)
    return total / (len(keys) - 1)


def test_sampled_speculation_has_the_plain_distribution_and_a_broken_verifier_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = 4000
    plain = _first_tokens(None, draws)
    proposer = TableProposer(vocab_size=VOCAB, max_tokens=3, seed=5)
    assert _chi_square_per_degree(_first_tokens(proposer, draws), plain) < 1.35

    def accept_everything(logits_BKV, proposal, **settings):
        settings["uniforms"] = torch.zeros_like(settings["uniforms"])
        return verify(logits_BKV, proposal, **settings)

    verify = engine_module.verify
    monkeypatch.setattr(engine_module, "verify", accept_everything)
    assert _chi_square_per_degree(_first_tokens(proposer, draws), plain) > 3


def test_rounds_account_for_every_token_and_the_last_one_is_untrimmed() -> None:
    proposer = TableProposer(vocab_size=VOCAB, max_tokens=4)
    for completion in _decode(_requests(17), proposer=proposer, temperature=0.0).values():
        committed = 1 + sum(r.acceptance_length for r in completion.rounds)
        if completion.finish_reason == "stop":
            assert committed >= len(completion.output_ids)
            assert completion.output_ids[-1] == 1
        else:
            assert committed >= 21
            assert committed - completion.rounds[-1].acceptance_length <= 20
            assert len(completion.output_ids) == 20
        for r in completion.rounds:
            assert r.accepted_draft_length <= r.proposal_length <= 4
            assert r.acceptance_length - r.accepted_draft_length in (0, 1)


def test_a_prompt_near_the_limit_gets_what_is_left_and_one_past_it_is_refused() -> None:
    request = Request(id="long", prompt_ids=tuple(range(2, 11)) * 2, seed=0)
    found = _decode([request], proposer=None, temperature=1.0, max_length=20)
    assert len(found["long"].output_ids) <= 2
    with pytest.raises(ValueError, match="18 prompt tokens do not fit 18"):
        _decode([request], proposer=None, temperature=1.0, max_length=18)


def test_the_clock_accounts_for_the_wall_time() -> None:
    clock = Clock()
    target = TinyTarget(vocab_size=VOCAB)
    list(
        decode(
            target,
            TableProposer(vocab_size=VOCAB, max_tokens=2),
            _requests(3),
            sampling=Sampling(),
            stop_ids=(1,),
            max_new_tokens=8,
            batch_size=2,
            max_length=32,
            clock=clock,
        )
    )
    assert min(clock.prefill, clock.draft, clock.verify) > 0
    assert 0 <= clock.host < clock.wall
