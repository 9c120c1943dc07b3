"""Clauses of proposers, for trained drafts and for drafts that are not trained, with chains and with trees.

A proposer is driven by hand along known texts, and by the engine with a tiny target. This file knows the contract of
proposers. It does not know how a draft is made.

Legend: B slots in a call, T tokens, K proposed tokens at most, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling, features_for
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.decoding.proposal_check import ProposalCheck
from deepspec_core.testing.conformance import Suite, clause, require
from deepspec_core.testing.driven_proposer import GREEDY, SAMPLED, DrivenProposer
from deepspec_core.testing.global_draws import no_global_draws
from deepspec_core.testing.random_batches import features_of, random_sample
from deepspec_core.testing.tiny_target import TinyTarget

_PROPOSER = "deepspec_core/contracts/proposer.py: Proposer"
_PROPOSAL = "deepspec_core/contracts/proposer.py: Proposal"
_TREES = "docs/plugins.md#trees"
LENGTHS = (5, 9, 2, 7, 6)
"""The tokens of each sample that are its prompt."""
NODES = 10
"""The most tokens of a tree."""
_TEXT = 32
# Slots are started, proposed for, committed and freed in an order that leaves gaps. A step has its kind, and by slot a
# number.
_SCRIPT: tuple[tuple[str, dict[int, int]], ...] = (
    ("start", {1: 0, 3: 1}),
    ("propose", {1: 0, 3: 0}),
    ("accept", {1: 3, 3: 1}),
    ("start", {0: 2, 4: 3}),
    ("propose", {0: 0, 3: 0, 4: 0}),
    ("accept", {0: 1, 3: 4, 4: 2}),
    ("propose", {0: 0, 1: 0, 3: 0, 4: 0}),
    ("free", {3: 0}),
    ("start", {3: 4}),
    ("accept", {0: 2, 1: 1}),
    ("propose", {0: 0, 1: 0, 3: 0, 4: 0}),
)


class ProposerSuite(Suite):
    """Clauses of `contracts.proposer.Proposer`.

    tolerance: The largest difference of probabilities and confidence when products have another shape.
    distinct_tokens: The number of distinct tokens in texts: few, for drafts that look for repetitions.
    """

    kind = "draft"
    tolerance: ClassVar[float] = 1e-5
    distinct_tokens: ClassVar[int] = 60

    @abstractmethod
    def source(self) -> Any:
        """An object with `proposer()`, and with `tree_proposer(nodes)` if the draft proposes trees."""

    def trees(self) -> bool:
        """Whether the draft proposes trees."""
        return bool(self.registry().get("draft", self.component).proposes_trees)

    def target(self) -> TinyTarget:
        """The target that text is decoded with: H 32, V 64."""
        return TinyTarget(vocab_size=64, hidden_size=32, num_layers=8, sharpness=2.0)

    def driven(self, tree_nodes: int | None = None) -> DrivenProposer:
        """A proposer with five open slots."""
        return DrivenProposer(self.source(), num_slots=5, max_length=_TEXT + 16, tree_nodes=tree_nodes)

    def sample(self, index: int, num_taps: int, length: int = _TEXT) -> Sample:
        """A text of 32 tokens, or `length`, with random features. All tokens but the first are supervised."""
        sample = random_sample(str(index), length, seed=index, num_taps=num_taps)
        generator = torch.Generator().manual_seed(100 + index)
        ids_T = torch.randint(2, 2 + self.distinct_tokens, (length,), generator=generator)
        return evolve(sample, input_ids=ids_T)

    def prompts(self, driven: DrivenProposer, slots: Sequence[int] = range(4)) -> dict[int, tuple[Sample, int]]:
        """slot -> (text, number of its tokens that are the prompt). The i-th slot has the i-th text."""
        taps = len(driven.proposer.taps)
        return {slot: (self.sample(index, taps), LENGTHS[index]) for index, slot in enumerate(slots)}

    @clause("`proposer()` gives max_tokens, taps and the methods of a proposer", written=_PROPOSER)
    def test_there_is_a_proposer(self) -> None:
        proposer = self.source().proposer()
        require(isinstance(proposer, Proposer), f"{type(proposer).__name__}, in which members are missing")
        ProposalCheck(proposer, vocab_size=64)

    @clause("a proposal has the shapes and numbers that verification needs", written=_PROPOSAL)
    def test_proposals_can_be_verified(self) -> None:
        for sampling in (GREEDY, SAMPLED, Sampling(temperature=0.7, top_k=5)):
            driven = self.driven()
            driven.start(self.prompts(driven))
            checked(driven, [0, 1, 2, 3], sampling)
            driven.accept(dict.fromkeys(range(4), 1))
            checked(driven, [0, 2], sampling)

    @clause("`propose` proposes at most limits[b] tokens, and at most max_tokens", written=_PROPOSER)
    def test_limits_are_kept(self) -> None:
        for sampling in (GREEDY, SAMPLED):
            driven = self.driven()
            driven.start(self.prompts(driven))
            most = driven.proposer.max_tokens
            for limits in ([0, 1, most, most + 3], [1, 0, 0, 1], [0, 0, 0, 0]):
                proposal = driven.propose(range(4), sampling, limits=limits)
                require(proposal.tokens.shape[1] <= most, f"{proposal.tokens.shape[1]} columns, max_tokens {most}")
                for length, limit in zip(proposal.lengths.tolist(), limits, strict=True):
                    require(length <= min(limit, most), f"{length} tokens where the limit is {limit}")

    @clause("the uniforms are the only source of randomness", written=_PROPOSER)
    def test_random_numbers_are_the_engines(self) -> None:
        driven = self.driven()
        driven.start(self.prompts(driven))
        with no_global_draws():
            first = driven.propose(range(4), SAMPLED)
        torch.manual_seed(99)
        again = driven.propose(range(4), SAMPLED)
        _same(again, first, range(4), self.tolerance, "another proposal with the same uniforms")

    @clause("a slot proposes beside others what it proposes alone, in any order of slots", written=_PROPOSER)
    def test_slots_do_not_see_each_other(self) -> None:
        for sampling in (GREEDY, SAMPLED):
            self._as_alone(sampling, None)

    @clause("a slot that is used again remembers nothing of the sequence before", written=_PROPOSER)
    def test_a_used_slot_is_new(self) -> None:
        for freed in (True, False):
            used, fresh = self.driven(), self.driven()
            prompts = self.prompts(used, [2])
            used.start({2: (self.sample(7, len(used.proposer.taps)), 20)})
            used.propose([2], SAMPLED)
            used.accept({2: 2})
            if freed:
                used.proposer.free(torch.tensor([2]))
            for one in (used, fresh):
                one.start(prompts)
            words = f"in a slot that held another text{'' if freed else ' and was not freed'}"
            _same(used.propose([2], SAMPLED), fresh.propose([2], SAMPLED), [0], self.tolerance, words)

    @clause("what is committed counts, all of it, and nothing else: not what was proposed", written=_PROPOSER)
    def test_committed_tokens_are_the_text(self) -> None:
        taps = len(self.driven().proposer.taps)
        for counts in ([1], [3], [2, 1, 1]):
            grown = self.driven()
            whole = {1: (self.sample(1, taps), 9), 3: (self.sample(3, taps), 6)}
            grown.start(whole)
            for count in counts:
                grown.propose([1, 3], SAMPLED)
                taken = min(count, grown.proposer.max_tokens + 1)
                grown.accept({1: taken, 3: taken})
            done = sum(min(count, grown.proposer.max_tokens + 1) for count in counts)
            fresh = self.driven()
            fresh.start({slot: (sample, length + done) for slot, (sample, length) in whole.items()})
            words = f"after commits of {counts} tokens, beside a prompt of the same text"
            found, expected = grown.propose([1, 3], SAMPLED), fresh.propose([1, 3], SAMPLED)
            _same(found, expected, range(2), self.tolerance, words)

    @clause(
        "`open_slots` opens as many slots of as many tokens as it is asked, empty, however often it is called",
        written=_PROPOSER,
    )
    def test_slots_are_opened_as_asked(self) -> None:
        again = DrivenProposer(self.source(), num_slots=2, max_length=24)
        taps = len(again.proposer.taps)
        again.start({1: (self.sample(0, taps), 5)})
        again.propose([1], SAMPLED)
        fresh = DrivenProposer(self.source(), num_slots=12, max_length=136)
        again.proposer.open_slots(12, 136)
        again.uniforms = fresh.uniforms
        for driven in (again, fresh):
            driven.start({11: (self.sample(1, taps, 128), 96), 1: (self.sample(2, taps, 128), 7)})
            driven.accept({11: 1, 1: 1})
        found, expected = again.propose([11, 1], SAMPLED), fresh.propose([11, 1], SAMPLED)
        _same(found, expected, range(2), self.tolerance, "12 slots, opened after 2, beside a new proposer")

    @clause("prompts are right-padded: what stands after their length does not count", written=_PROPOSER)
    def test_padding_of_prompts_does_not_count(self) -> None:
        proposals = []
        for filler in (0, 5):
            driven = self.driven()
            prompts = list(self.prompts(driven).values())
            lengths_B = torch.tensor([length for _, length in prompts])
            past_BT = torch.arange(_TEXT) >= lengths_B[:, None]
            ids_BT = torch.stack([sample.input_ids for sample, _ in prompts])
            features_BTC = torch.stack([features_for(driven.proposer, features_of(sample)) for sample, _ in prompts])
            features_BTC = features_BTC.masked_fill(past_BT[..., None], float("nan") if filler else 0.0)
            first_B = ids_BT.gather(1, lengths_B[:, None])[:, 0]
            slots_B = torch.arange(4)
            driven.proposer.start(slots_B, ids_BT.masked_fill(past_BT, filler), lengths_B, first_B, features_BTC)
            proposals.append(driven.propose(range(4), SAMPLED))
        _same(proposals[1], proposals[0], range(4), self.tolerance, "with other padding")

    @clause(
        "how many tokens are proposed, and the confidence in a token, follow from the tokens before it",
        written="docs/plugins.md#what-is-checked-while-decoding",
    )
    def test_a_token_does_not_decide_whether_it_is_proposed(self) -> None:
        driven = self.driven()
        driven.start(self.prompts(driven))
        generator = torch.Generator().manual_seed(3)
        first = driven.propose(range(4), SAMPLED)
        for column in range(driven.proposer.max_tokens):
            for _ in range(4):
                before = driven.uniforms.clone()
                driven.uniforms[:, column:] = torch.rand(
                    driven.uniforms[:, column:].shape, generator=generator
                ).double()
                other = driven.propose(range(4), SAMPLED)
                driven.uniforms = before
                for slot in range(4):
                    mine, theirs = (min(int(one.lengths[slot]), column + 1) for one in (other, first))
                    words = f"another number drawn for token {column} changes"
                    require(mine == theirs, f"{words} whether it is proposed: {theirs} tokens, then {mine}")
                    found = _differs(other, slot, first, slot, mine, self.tolerance, drawn=min(column, mine))
                    require(found is None, f"{words} what comes before it is drawn: {found}")

    @clause(
        "greedy text is the target's own, whatever is proposed; sampled text comes without an error", written=_PROPOSER
    )
    def test_decoding_is_lossless(self) -> None:
        self._lossless(None)

    @clause("a proposer of trees keeps to `max_nodes` and proposes what can be verified", written=_TREES)
    def test_trees_can_be_verified(self) -> None:
        self._needs_trees()
        for nodes in (1, NODES):
            proposer = self.source().tree_proposer(nodes)
            found = getattr(proposer, "max_nodes", None)
            require(found == nodes, f"max_nodes = {found}, where tree_proposer({nodes}) was asked")
            for sampling in (GREEDY, SAMPLED):
                driven = self.driven(nodes)
                driven.start(self.prompts(driven))
                proposal = checked(driven, [0, 1, 2, 3], sampling)
                require(proposal.parents is not None, "a chain: `parents` is None")

    @clause("a tree of a slot beside others is that of the slot alone", written=_TREES)
    def test_trees_do_not_see_each_other(self) -> None:
        self._needs_trees()
        self._as_alone(SAMPLED, NODES)

    @clause("greedy text with trees is the target's own; sampled text comes without an error", written=_TREES)
    def test_decoding_with_trees_is_lossless(self) -> None:
        self._needs_trees()
        self._lossless(NODES)

    def _needs_trees(self) -> None:
        if not self.trees():
            raise SkipTest(f"{self.component!r} proposes chains only")

    def _as_alone(self, sampling: Sampling, nodes: int | None) -> None:
        together = self._played(sampling, nodes, only=None)
        for slot in sorted({slot for _, slots in _SCRIPT for slot in slots}):
            alone = self._played(sampling, nodes, only=slot)
            for (step, row_slot), (proposal, row) in together.items():
                if row_slot == slot:
                    expected, expected_row = alone[step, slot]
                    length = int(expected.lengths[expected_row])
                    words = f"slot {slot} in step {step}, {'greedy' if sampling is GREEDY else 'sampled'}"
                    require(int(proposal.lengths[row]) == length, f"{words}: another number of tokens than alone")
                    found = _differs(proposal, row, expected, expected_row, length, self.tolerance)
                    require(found is None, f"{words}, differs from the slot alone: {found}")

    def _played(
        self, sampling: Sampling, nodes: int | None, only: int | None
    ) -> Mapping[tuple[int, int], tuple[Proposal, int]]:
        """The proposals of the script by (step, slot), for all slots or for one."""
        driven = self.driven(nodes)
        taps, most = len(driven.proposer.taps), driven.proposer.max_tokens + 1
        found: dict[tuple[int, int], tuple[Proposal, int]] = {}
        for step, (what, given) in enumerate(_SCRIPT):
            by_slot = {slot: number for slot, number in given.items() if only in (None, slot)}
            if not by_slot:
                continue
            if what == "start":
                driven.start({slot: (self.sample(index, taps), LENGTHS[index]) for slot, index in by_slot.items()})
            elif what == "accept":
                driven.accept({slot: min(count, most) for slot, count in by_slot.items()})
            elif what == "free":
                driven.proposer.free(torch.tensor(list(by_slot)))
            else:
                proposal = driven.propose(list(by_slot), sampling)
                found |= {(step, slot): (proposal, row) for row, slot in enumerate(by_slot)}
        return found

    def _lossless(self, nodes: int | None) -> None:
        for temperature in (0.0, 1.0):
            source = self.source()
            proposer = source.proposer() if nodes is None else source.tree_proposer(nodes)
            fast = _decoded(self.target(), proposer, temperature)
            if temperature == 0.0:
                plain = _decoded(self.target(), None, temperature)
                other = [name for name, ids in plain.items() if fast[name] != ids]
                require(not other, f"other text for {len(other)} of {len(plain)} prompts")


def _decoded(target: TinyTarget, proposer: Proposer | None, temperature: float) -> dict[str, tuple[int, ...]]:
    asked = [
        Request(id=str(i), prompt_ids=tuple(3 + (5 * i + 3 * j) % 30 for j in range(3 + 2 * i)), seed=i)
        for i in range(3)
    ]
    found = decode(
        target, proposer, asked, sampling=Sampling(temperature=temperature), stop_ids=(1,), max_new_tokens=8,
        batch_size=2, max_length=64,
    )  # fmt: skip
    return {one.id: tuple(one.output_ids) for one in found}


def checked(driven: DrivenProposer, slots: Sequence[int], sampling: Sampling) -> Proposal:
    """The proposal, after the checks that the engine makes."""
    proposal = driven.propose(slots, sampling)
    check = ProposalCheck(driven.proposer, vocab_size=64)
    slots_B = torch.tensor(slots)
    checked = check(proposal, slots_B=slots_B, sampling=sampling, uniforms_BK=driven.uniforms[slots_B])
    check.refuse(checked, checked.to_read.tolist())
    return proposal


def _same(found: Proposal, expected: Proposal, rows: Sequence[int], atol: float, words: str) -> None:
    for row in rows:
        mine, theirs = int(found.lengths[row]), int(expected.lengths[row])
        require(mine == theirs, f"{words}: {mine} tokens, not {theirs}")
        difference = _differs(found, row, expected, row, mine, atol)
        require(difference is None, f"{words}: {difference}")


def _differs(
    found: Proposal, row: int, expected: Proposal, other: int, length: int, atol: float, drawn: int | None = None
) -> str | None:
    """A description of how two slots' proposals differ up to `length`. Tokens: up to `drawn` if it is less."""
    tokens = length if drawn is None else drawn
    if not torch.equal(found.tokens[row, :tokens], expected.tokens[other, :tokens]):
        return f"tokens {found.tokens[row, :tokens].tolist()}, not {expected.tokens[other, :tokens].tolist()}"
    for name in ("parents", "probabilities", "confidence"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        if (mine is None) != (theirs is None):
            return f"`{name}` in one of them only"
        if mine is not None and length:
            away = _away(mine[row, :length], theirs[other, :length])
            if not away <= (0.0 if name == "parents" else atol):
                return f"`{name}` by up to {away:.3g}"
    return None


def _away(mine: Tensor, theirs: Tensor) -> float:
    if mine.shape != theirs.shape:
        return float("inf")
    return float((mine.double() - theirs.double()).abs().max())
