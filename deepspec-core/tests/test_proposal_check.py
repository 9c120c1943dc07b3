"""What a dishonest proposer returns ends in an error that names it, or costs speed. It never changes an output."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.engine import Committed, Request, decode
from deepspec_core.decoding.proposal_check import ProposalCheck
from deepspec_core.decoding.scheduled import ScheduledProposer
from deepspec_core.errors import PluginError
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.tiny_target import TinyTarget

V, K = 12, 3
Change = Callable[[Proposal], Any]


class Odd(TableProposer):
    """Proposes what `change` makes of an honest proposal, from round `since` on."""

    def __init__(self, change: Change, *, since: int = 0) -> None:
        super().__init__(vocab_size=V, max_tokens=K)
        self.change, self.since, self.rounds = change, since, 0

    def propose(self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]):
        honest = super().propose(slots, limits, sampling, uniforms, stop_ids)
        self.rounds += 1
        return self.change(honest) if self.rounds > self.since else honest


def _outputs(
    proposer: TableProposer | None, temperature: float, *, told: list[Committed] | None = None, threshold: float = 0.0
) -> dict[str, tuple[int, ...]]:
    found = decode(
        TinyTarget(vocab_size=V, hidden_size=8, num_layers=2, seed=3),
        proposer,
        [Request(id=str(i), prompt_ids=(3 + i, 4), seed=i) for i in range(6)],
        sampling=Sampling(temperature=temperature),
        stop_ids=(),
        max_new_tokens=16,
        batch_size=4,
        max_length=64,
        confidence_threshold=threshold,
        on_round=None if told is None else told.append,
    )
    return {completion.id: completion.output_ids for completion in found}


def _with(**fields: Callable[[Proposal], Any]) -> Change:
    return lambda honest: evolve(honest, **{name: make(honest) for name, make in fields.items()})


def _one(tensor: Tensor, value: float) -> Tensor:
    """The tensor with another value at the first token of its last row."""
    changed = tensor.clone()
    changed[-1, 0] = value
    return changed


MISSHAPEN = {
    "nothing": (lambda _: None, "`propose()`", "NoneType"),
    "flat tokens": (_with(tokens=lambda p: p.tokens[0]), "`tokens`", "[3], torch.int64"),
    "tokens of fewer slots": (_with(tokens=lambda p: p.tokens[1:]), "`tokens`", "[3, 3]"),
    "too many columns": (_with(tokens=lambda p: p.tokens.repeat(1, 2)), "`tokens`", "[4, 6]"),
    "tokens as floats": (_with(tokens=lambda p: p.tokens.float()), "`tokens`", "float32"),
    "lengths a token": (_with(lengths=lambda p: p.tokens), "`lengths`", "[4, 3]"),
    "lengths as a list": (_with(lengths=lambda p: p.lengths.tolist()), "`lengths`", "list"),
    "probabilities of the tokens": (
        _with(probabilities=lambda p: p.probabilities[..., 0]),
        "`probabilities`",
        "[4, 3]",
    ),
    "another vocabulary": (_with(probabilities=lambda p: p.probabilities[..., 1:]), "`probabilities`", "[4, 3, 11]"),
    "rounded probabilities": (_with(probabilities=lambda p: p.probabilities.half()), "`probabilities`", "float16"),
    "confidence a slot": (_with(confidence=lambda p: p.lengths.float()), "`confidence`", "[4]"),
    "tokens elsewhere": (_with(tokens=lambda p: p.tokens.to("meta")), "`tokens`", "meta"),
}
NUMBERS = {
    "negative lengths": (_with(lengths=lambda p: -p.lengths), "`lengths`", "-3, in row 0"),
    "long": (_with(lengths=lambda p: p.lengths + 1), "`lengths`", "4, in row 0"),
    "longer than its columns": (_with(tokens=lambda p: p.tokens[:, :1], probabilities=lambda p: None), "`lengths`", ""),
    "no such token": (_with(tokens=lambda p: _one(p.tokens, V)), "`tokens`", "12, in row 3"),
    "a token below 0": (_with(tokens=lambda p: _one(p.tokens, -1)), "`tokens`", "-1, in row 3"),
    "no confidence": (
        _with(confidence=lambda p: _one(torch.zeros(p.tokens.shape), float("nan"))),
        "`confidence`",
        "nan",
    ),
}
DISTRIBUTIONS = {
    "logarithms": (_with(probabilities=lambda p: p.probabilities.log()), "no logarithms"),
    "logits": (_with(probabilities=lambda p: 5 + p.probabilities.log()), "not logits"),
    "sums of 1.01": (_with(probabilities=lambda p: p.probabilities * 1.01), "a sum of 1.0"),
    "half of it": (_with(probabilities=lambda p: p.probabilities / 2), "a sum of 0.5"),
    "no numbers": (_with(probabilities=lambda p: p.probabilities * float("nan")), "nan"),
    "below 0": (
        _with(probabilities=lambda p: p.probabilities - 0.1 * torch.eye(V)[0] + 0.1 * torch.eye(V)[5]),
        "probabilities",
    ),
    "0 at the token": (
        _with(probabilities=lambda p: p.probabilities.scatter(2, p.tokens[..., None], 0.0)),
        "0 at token",
    ),
    "chosen, not drawn": (_with(tokens=lambda p: p.probabilities.argmax(-1)), "does not give"),
    "drawn from another": (_with(probabilities=lambda p: torch.full_like(p.probabilities, 1 / V)), "does not give"),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", [*MISSHAPEN, *NUMBERS])
def test_what_cannot_be_verified_is_refused(name: str, temperature: float) -> None:
    change, field, says = {**MISSHAPEN, **NUMBERS}[name]
    told: list[Committed] = []
    with pytest.raises(PluginError, match=re.escape(field)) as caught:
        _outputs(Odd(change), temperature, told=told)
    assert says in str(caught.value.found)
    assert caught.value.expected
    assert ", Odd (" in str(caught.value.where)
    # Of the round, nothing was told: each sequence has its first token, which is the target's.
    assert [len(one.ids) for one in told] == [1] * 4


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_what_is_no_distribution_of_the_tokens_is_refused_where_it_would_count(name: str) -> None:
    change, says = DISTRIBUTIONS[name]
    with pytest.raises(PluginError) as caught:
        _outputs(Odd(change), 1.0)
    assert says in f"{caught.value.found} {caught.value.expected}"
    # At temperature 0 probabilities are not read.
    assert _outputs(Odd(change), 0.0) == _outputs(None, 0.0)


def _in_bf16(change: Change) -> Odd:
    """Proposes from a table in bf16: distributions are rounded to bf16 before the draw."""
    found = Odd(change)
    found.logits_VV = found.logits_VV.bfloat16()
    return found


def test_distributions_in_bf16_are_checked_to_their_own_precision() -> None:
    told: list[torch.dtype] = []

    def honest(proposal: Proposal) -> Proposal:
        told.append(proposal.probabilities.dtype)
        return proposal

    assert len(_outputs(_in_bf16(honest), 1.0)) == 6
    assert set(told) == {torch.bfloat16}
    for name, (change, says) in DISTRIBUTIONS.items():
        with pytest.raises(PluginError) as caught:
            _outputs(_in_bf16(change), 1.0)
        assert says in f"{caught.value.found} {caught.value.expected}", name


def test_distributions_that_are_copied_to_fp32_are_those_of_the_draws() -> None:
    expected = _outputs(_in_bf16(lambda p: p), 1.0)
    copied = _outputs(_in_bf16(_with(probabilities=lambda p: p.probabilities.float())), 1.0)
    assert copied == expected


def test_distributions_that_are_rounded_after_the_draw_are_refused() -> None:
    """Some tokens then lie where their uniform numbers do not fall."""

    class Large(TableProposer):
        def propose(self, *arguments: Any) -> Proposal:
            honest = super().propose(*arguments)
            return evolve(honest, probabilities=honest.probabilities.bfloat16())

    slots = torch.arange(200)
    proposer = Large(vocab_size=3000, max_tokens=1)
    proposer.open_slots(200, 8)
    proposer.start(slots, slots[:, None], torch.ones_like(slots), slots, torch.zeros(200, 1, 1))
    uniforms = torch.rand(200, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampling, check = Sampling(temperature=1.0), ProposalCheck(proposer, vocab_size=3000)
    proposal = proposer.propose(slots, torch.ones_like(slots), sampling, uniforms, ())
    found = check(proposal, slots_B=slots, sampling=sampling, uniforms_BK=uniforms)
    with pytest.raises(PluginError, match="does not give"):
        check.refuse(found, found.to_read.tolist())


@pytest.mark.parametrize("asynchronous", [None, False, True])
def test_confidence_that_is_no_number_is_refused_before_it_cuts_a_proposal(asynchronous: bool | None) -> None:
    odd = Odd(_with(confidence=lambda p: torch.full(p.tokens.shape, float("nan"))))
    if asynchronous is None:
        with pytest.raises(PluginError, match="`confidence`"):
            _outputs(odd, 1.0, threshold=0.5)
    else:
        with pytest.raises(PluginError, match="`confidence`"):
            _outputs(ScheduledProposer(odd, lambda requests, tokens: 100.0, asynchronous=asynchronous), 1.0)


@pytest.mark.parametrize("name", ["negative lengths", "no such token"])
def test_numbers_are_looked_at_in_every_round(name: str) -> None:
    change, field, _ = NUMBERS[name]
    with pytest.raises(PluginError, match=field):
        _outputs(Odd(change, since=5), 0.0)


@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_distributions_are_looked_at_in_every_round(name: str) -> None:
    """A proposer that is honest for a while would change outputs from then on."""
    change, says = DISTRIBUTIONS[name]
    with pytest.raises(PluginError) as caught:
        _outputs(Odd(change, since=5), 1.0)
    assert says in f"{caught.value.found} {caught.value.expected}"


def test_a_length_that_is_no_length_is_refused_where_proposals_are_cut() -> None:
    change = _with(lengths=lambda p: -p.lengths, confidence=lambda p: torch.zeros(p.tokens.shape))
    with pytest.raises(PluginError, match="`lengths`"):
        _outputs(Odd(change), 0.0, threshold=0.1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_pads_a_proposal_may_be_anything(temperature: float) -> None:
    def padded(honest: Proposal) -> Proposal:
        lengths_B = torch.arange(len(honest.tokens)) % (K + 1)
        beyond_BK = torch.arange(K) >= lengths_B[:, None]
        odd_BKV = honest.probabilities.masked_fill(beyond_BK[..., None], -7.0)
        return Proposal(tokens=honest.tokens.masked_fill(beyond_BK, -1), lengths=lengths_B, probabilities=odd_BKV)

    def short(honest: Proposal) -> Proposal:
        return evolve(honest, lengths=torch.arange(len(honest.tokens)) % (K + 1))

    assert _outputs(Odd(padded), temperature) == _outputs(Odd(short), temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_proposer_that_writes_into_what_it_is_given_changes_nothing(temperature: float) -> None:
    class Writing(TableProposer):
        def propose(self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]):
            proposal = super().propose(slots, limits, sampling, uniforms, stop_ids)
            self.max_tokens += 1  # read once, when decoding begins
            for given in (slots, limits, uniforms):
                given.zero_()
            self.max_tokens = K
            return proposal

        def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
            super().accept(slots, committed_ids, committed, features)
            for given in (slots, committed_ids, committed, features):
                given.zero_()

    honest = TableProposer(vocab_size=V, max_tokens=K)
    assert _outputs(Writing(vocab_size=V, max_tokens=K), temperature) == _outputs(honest, temperature)


@pytest.mark.parametrize(("field", "value"), [("max_tokens", -1), ("max_tokens", 2.5), ("taps", ("last",))])
def test_a_proposer_that_says_no_numbers_is_refused(field: str, value: Any) -> None:
    proposer = TableProposer(vocab_size=V, max_tokens=K)
    setattr(proposer, field, value)
    with pytest.raises(PluginError, match=f"`{field}`"):
        _outputs(proposer, 0.0)


@pytest.mark.parametrize("method", ["open_slots", "start", "propose", "accept", "free"])
def test_a_proposer_that_raises_is_named(method: str) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("of the odd one")

    proposer = TableProposer(vocab_size=V, max_tokens=K)
    setattr(proposer, method, fails)
    with pytest.raises(PluginError, match=rf"a proposer failed in {method}\(\)") as caught:
        _outputs(proposer, 0.0)
    assert "TableProposer" in str(caught.value.where)
    assert "KeyError: 'of the odd one'" in str(caught.value.found)
