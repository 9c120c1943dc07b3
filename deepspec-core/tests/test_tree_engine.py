"""Trees in the engine over a tiny random target: losslessness, independence of neighbours, what the proposer is told,
and what a dishonest proposer returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

import deepspec_core.decoding.tree as tree_module
from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling
from deepspec_core.decoding.calibrated import CalibratedProposer
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.decoding.scheduled import ScheduledProposer
from deepspec_core.errors import PluginError
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.table_trees import TreeTableProposer
from deepspec_core.testing.tiny_target import TinyTarget

VOCAB, DEPTH, NODES = 8, 3, 30


def _requests(count: int) -> list[Request]:
    return [
        Request(id=str(i), prompt_ids=tuple((7 * i + j) % (VOCAB - 2) + 2 for j in range(2 + i % 5)), seed=i)
        for i in range(count)
    ]


def _proposer(**options: Any) -> TreeTableProposer:
    return TreeTableProposer(vocab_size=VOCAB, max_tokens=DEPTH, max_nodes=NODES, **options)


def _decode(
    requests: list[Request],
    proposer: Proposer | None,
    temperature: float,
    *,
    stop_ids: tuple[int, ...] = (1,),
    **options: int,
):
    target = TinyTarget(vocab_size=VOCAB, hidden_size=8, num_layers=2, seed=3)
    settings = {"max_new_tokens": 20, "batch_size": 4, "max_length": 64, **options}
    found = decode(
        target, proposer, requests, sampling=Sampling(temperature=temperature), stop_ids=stop_ids, **settings
    )
    return {completion.id: completion for completion in found}


def _outputs(found: dict[str, Completion]) -> dict[str, tuple[int, ...]]:
    return {name: completion.output_ids for name, completion in found.items()}


@pytest.mark.parametrize("stop_short", [False, True])
def test_greedy_trees_equal_plain_greedy(stop_short: bool) -> None:
    requests = _requests(17)
    plain = _decode(requests, None, 0.0)
    fast = _decode(requests, _proposer(stop_short=stop_short), 0.0)
    assert _outputs(fast) == _outputs(plain)
    rounds = [one for completion in fast.values() for one in completion.rounds]
    assert max(one.accepted_draft_length for one in rounds) > 1, "or no long path was tested"
    for one in rounds:
        assert one.nodes is not None
        assert one.accepted_draft_length <= one.proposal_length <= min(DEPTH, one.nodes)
        assert one.acceptance_length - one.accepted_draft_length in (0, 1)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    requests = _requests(9)
    together = _decode(requests, _proposer(), 1.0, batch_size=5)
    alone = {}
    for request in reversed(requests):
        alone |= _decode([request], _proposer(), 1.0, batch_size=1)
    assert _outputs(together) == _outputs(alone)


@pytest.mark.parametrize(
    "wrap", [lambda own: CalibratedProposer(own, [1.0] * DEPTH), lambda own: ScheduledProposer(own, min)]
)
def test_wrappers_of_proposers_hand_the_size_of_trees_on(wrap: Callable[[Proposer], Proposer]) -> None:
    assert wrap(_proposer()).max_nodes == NODES  # type: ignore[attr-defined]


def test_a_calibrated_tree_is_decoded_like_the_tree() -> None:
    calibrated = CalibratedProposer(_proposer(), [2.0] * DEPTH)
    assert _outputs(_decode(_requests(5), calibrated, 0.0)) == _outputs(_decode(_requests(5), _proposer(), 0.0))


def _expected(prompt: tuple[int, ...], count: int) -> dict[tuple[int, ...], float]:
    """The probability of every sequence of `count` tokens after the prompt."""
    target = TinyTarget(vocab_size=VOCAB, hidden_size=8, num_layers=2, seed=3)
    expected = {(): 1.0}
    for length in range(count):
        prefixes = list(expected)
        ids = torch.tensor([prompt + prefix for prefix in prefixes])
        last_NH = target.features(ids, torch.ones_like(ids), None, None, ()).last_hidden[:, -1]
        p_NV = (last_NH @ target.head_weight().T).double().softmax(-1).tolist()
        expected = {
            (*prefix, token): expected[prefix] * p
            for prefix, row in zip(prefixes, p_NV, strict=True)
            for token, p in enumerate(row)
        }
        assert len(expected) == VOCAB ** (length + 1)
    return expected


def _chi_square_per_degree(proposer: Proposer, prompt: tuple[int, ...], draws: int = 4000) -> float:
    """Of the first three sampled tokens, against their exact probabilities: 1 when right, with a deviation of 0.15."""
    requests = [Request(id=str(i), prompt_ids=prompt, seed=i) for i in range(draws)]
    found = _decode(requests, proposer, 1.0, stop_ids=(), max_new_tokens=3, batch_size=500, max_length=8)
    observed = Counter(completion.output_ids for completion in found.values())
    counted = {key: draws * p for key, p in _expected(prompt, 3).items() if draws * p >= 8}
    pairs = [(observed[key], mean) for key, mean in counted.items()]
    pairs.append((draws - sum(observed[key] for key in counted), draws - sum(counted.values())))
    assert len(pairs) > 80, "too few to tell"
    return sum((count - mean) ** 2 / mean for count, mean in pairs) / (len(pairs) - 1)


def test_sampled_trees_have_the_targets_distribution_and_a_broken_walk_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _chi_square_per_degree(_proposer(seed=5), (3, 4)) < 1.5
    verify_tree = tree_module.verify_tree

    def same_draw_at_every_depth(*arguments: Any, uniforms: Tensor, **more: Any) -> Any:
        return verify_tree(*arguments, uniforms=uniforms[:, :1].expand_as(uniforms), **more)

    monkeypatch.setattr(tree_module, "verify_tree", same_draw_at_every_depth)
    assert _chi_square_per_degree(_proposer(seed=5), (3, 4)) > 3


class _Recording(TreeTableProposer):
    """Keeps the features of every sequence, as it is told."""

    def open_slots(self, num_slots: int, max_length: int) -> None:
        super().open_slots(num_slots, max_length)
        self.told: dict[int, tuple[list[int], list[Tensor]]] = {}
        self.finished: list[tuple[list[int], list[Tensor]]] = []

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        super().start(slots, prompt_ids, lengths, first_token, features)
        for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
            ids = [*prompt_ids[row, :length].tolist(), int(first_token[row])]
            self.told[slot] = (ids, [features[row, :length].clone()])

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        super().accept(slots, committed_ids, committed, features)
        for row, (slot, count) in enumerate(zip(slots.tolist(), committed.tolist(), strict=True)):
            self.told[slot][0].extend(committed_ids[row, :count].tolist())
            self.told[slot][1].append(features[row, :count].clone())

    def free(self, slots: Tensor) -> None:
        super().free(slots)
        self.finished += [self.told.pop(slot) for slot in slots.tolist() if slot in self.told]


def test_the_features_of_the_accepted_path_are_those_of_the_text() -> None:
    """After many rounds, too: so the target's cache holds the path, in order."""
    proposer = _Recording(vocab_size=VOCAB, max_tokens=DEPTH, max_nodes=NODES, stop_short=True)
    _decode(_requests(8), proposer, 0.0, stop_ids=())
    assert len(proposer.finished) == 8
    target = TinyTarget(vocab_size=VOCAB, hidden_size=8, num_layers=2, seed=3)
    for ids, parts in proposer.finished:
        told_TC = torch.cat(parts)
        text = torch.tensor([ids[: len(told_TC)]])
        expected_TC = target.features(text, torch.ones_like(text), None, None, (0,)).hidden[0]
        torch.testing.assert_close(told_TC, expected_TC, rtol=1e-5, atol=1e-5)


def _with(**fields: Callable[[Proposal], Any]) -> Callable[[Proposal], Proposal]:
    return lambda honest: evolve(honest, **{name: make(honest) for name, make in fields.items()})


def _at(tensor: Tensor, column: int, value: int) -> Tensor:
    changed = tensor.clone()
    changed[-1, column] = value
    return changed


ODD = {
    "too many nodes": (_with(tokens=lambda p: p.tokens.repeat(1, 2)), "`tokens`", "[4, 60]"),
    "parents of fewer nodes": (_with(parents=lambda p: p.parents[:, 1:]), "`parents`", "[4, 29]"),
    "parents as floats": (_with(parents=lambda p: p.parents.float()), "`parents`", "float32"),
    "confidence": (_with(confidence=lambda p: torch.zeros(p.tokens.shape)), "`confidence`", "a tree with"),
    "probabilities": (
        _with(probabilities=lambda p: torch.full((*p.tokens.shape, VOCAB), 1 / VOCAB)),
        "`probabilities`",
        "a tree with",
    ),
    "its own parent": (_with(parents=lambda p: _at(p.parents, 2, 2)), "`parents`", "2 of node 2, in row 3"),
    "a parent that comes later": (_with(parents=lambda p: _at(p.parents, 2, 5)), "`parents`", "5 of node 2, in row 3"),
    "a parent below -1": (_with(parents=lambda p: _at(p.parents, 0, -2)), "`parents`", "-2 of node 0, in row 3"),
    "a path too long": (
        _with(parents=lambda p: torch.arange(-1, NODES - 1).expand_as(p.parents)),
        "`parents`",
        "2 of node 3, in row 0",
    ),
    "twins": (
        _with(parents=lambda p: torch.full_like(p.parents, -1), tokens=lambda p: torch.full_like(p.tokens, 4)),
        "`tokens`",
        "token 4 twice after node -1",
    ),
    "more nodes than columns": (_with(lengths=lambda p: p.lengths + 1), "`lengths`", "31, in row 0"),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", list(ODD))
def test_a_tree_that_is_none_is_refused(name: str, temperature: float) -> None:
    change, field, found = ODD[name]

    class Odd(TreeTableProposer):
        def propose(self, *given: Any) -> Proposal:
            return change(super().propose(*given))

    with pytest.raises(PluginError, match=field) as caught:
        _decode(_requests(4), Odd(vocab_size=VOCAB, max_tokens=DEPTH, max_nodes=NODES), temperature, stop_ids=())
    assert found in str(caught.value.found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tree_of_no_columns_commits_the_targets_own_token(temperature: float) -> None:
    class Empty(TreeTableProposer):
        def propose(self, slots: Tensor, *_: Any) -> Proposal:
            nothing = torch.zeros(len(slots), 0, dtype=torch.long)
            return Proposal(tokens=nothing, parents=nothing, lengths=nothing.sum(1))

    empty = Empty(vocab_size=VOCAB, max_tokens=DEPTH, max_nodes=NODES)
    found = _decode(_requests(3), empty, temperature)
    rounds = [one for completion in found.values() for one in completion.rounds]
    assert {(one.proposal_length, one.acceptance_length, one.nodes) for one in rounds} == {(0, 1, 0)}
    if temperature == 0:
        assert _outputs(found) == _outputs(_decode(_requests(3), None, 0.0))


def test_what_stands_past_a_tree_may_be_anything() -> None:
    class Padded(TreeTableProposer):
        def propose(
            self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
        ) -> Proposal:
            honest = super().propose(slots, limits, sampling, uniforms, stop_ids)
            assert honest.parents is not None
            beyond = torch.arange(NODES) >= honest.lengths[:, None]
            return evolve(
                honest, tokens=honest.tokens.masked_fill(beyond, -7), parents=honest.parents.masked_fill(beyond, 99)
            )

    padded = Padded(vocab_size=VOCAB, max_tokens=DEPTH, max_nodes=NODES, stop_short=True)
    assert _outputs(_decode(_requests(6), padded, 1.0)) == _outputs(
        _decode(_requests(6), _proposer(stop_short=True), 1.0)
    )


@pytest.mark.parametrize("value", [-1, 2.5])
def test_a_number_of_nodes_that_is_none_is_refused(value: Any) -> None:
    proposer = _proposer()
    proposer.max_nodes = value
    with pytest.raises(PluginError, match="`max_nodes`"):
        _decode(_requests(1), proposer, 0.0)


def test_a_chain_longer_than_a_tree_is_wide_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target and the draft are told of room for max_length tokens, and for the widest proposal behind them."""
    rooms: list[int] = []
    open_slots = TinyTarget.open_slots

    class Narrow(TableProposer):
        max_nodes = 1

    def told(self: TinyTarget, num_slots: int, max_length: int) -> None:
        rooms.append(max_length)
        open_slots(self, num_slots, max_length)

    monkeypatch.setattr(TinyTarget, "open_slots", told)
    _decode(_requests(2), Narrow(vocab_size=VOCAB, max_tokens=DEPTH, seed=3), 0.0, max_length=24)
    assert rooms == [24 + DEPTH + 1]
