"""A draft's proposer driven by hand along known samples, as the engine drives it, for tests of proposals.

Whatever is proposed, what is committed is the sample's own tokens, so every round's context is known.

Legend: S slots, K proposed tokens at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling, features_for
from deepspec_core.testing.conformance import require
from deepspec_core.testing.random_batches import features_of, random_sample

__all__ = [
    "GREEDY",
    "SAMPLED",
    "DrivenProposer",
    "check_batched_as_alone",
    "check_best_tree",
    "check_reused_slot",
    "check_same_proposals",
    "prompts",
    "sampled_proposal",
    "started",
]

GREEDY = Sampling()
"""Temperature 0."""
SAMPLED = Sampling(temperature=1.0)
"""Temperature 1, from the whole vocabulary."""


class DrivenProposer:
    """A proposer that a test drives by hand.

    Its slots are open. `uniforms` [S, K] are the random numbers of every round. With `tree_nodes` it proposes trees.
    """

    def __init__(
        self, draft: DraftModel, *, num_slots: int = 4, max_length: int = 32, tree_nodes: int | None = None
    ) -> None:
        self.proposer = draft.proposer() if tree_nodes is None else draft.tree_proposer(tree_nodes)
        self.proposer.open_slots(num_slots, max_length)
        generator = torch.Generator().manual_seed(5)
        self.uniforms = torch.rand(num_slots, self.proposer.max_tokens, generator=generator, dtype=torch.float64)
        self._at: dict[int, tuple[Sample, int]] = {}

    def start(self, prompts: Mapping[int, tuple[Sample, int]]) -> None:
        """slot -> (sample, tokens of it that are the prompt): samples of one length; the next token is the target's."""
        samples = [sample for sample, _ in prompts.values()]
        self.proposer.start(
            torch.tensor(list(prompts)),
            torch.stack([sample.input_ids for sample in samples]),
            torch.tensor([length for _, length in prompts.values()]),
            torch.stack([sample.input_ids[length] for sample, length in prompts.values()]),
            torch.stack([features_for(self.proposer, features_of(sample)) for sample in samples]),
        )
        self._at |= prompts

    def accept(self, committed: Mapping[int, int]) -> None:
        """Commit tokens of samples: by slot, how many."""
        width = max(committed.values()) + 1
        ids, features = [], []
        for slot, count in committed.items():
            sample, start = self._at[slot]
            ids.append(sample.input_ids[start + 1 : start + 1 + width])
            features.append(features_for(self.proposer, features_of(sample))[start : start + width])
            self._at[slot] = (sample, start + count)
        counts = torch.tensor(list(committed.values()))
        self.proposer.accept(torch.tensor(list(committed)), torch.stack(ids), counts, torch.stack(features))

    def propose(
        self,
        slots: Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        limits: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Proposal:
        """Propose for these slots. Without `limits`, the draft proposes as many tokens as it can."""
        at_most = [self.proposer.max_tokens + 1] * len(slots) if limits is None else list(limits)
        chosen = torch.tensor(slots)
        found: Any = self.proposer.propose(chosen, torch.tensor(at_most), sampling, self.uniforms[chosen], stop_ids)
        require(isinstance(found, Proposal), f"`propose` returns {type(found).__name__}, not a Proposal")
        for name in ("tokens", "lengths", "probabilities", "confidence", "parents"):
            part = getattr(found, name)
            optional = part is None and name not in ("tokens", "lengths")
            require(optional or isinstance(part, Tensor), f"`{name}` is of type {type(part).__name__}, not a tensor")
        proposal: Proposal = found
        return proposal


def prompts() -> dict[int, tuple[Sample, int]]:
    """Arguments for `start`: four samples of 24 tokens, of which 5, 9, 2 and 7 are the prompt."""
    return {slot: (random_sample(str(slot), 24, seed=slot), length) for slot, length in enumerate((5, 9, 2, 7))}


def started(draft: DraftModel, *, tree_nodes: int | None = None) -> DrivenProposer:
    """A driven proposer that has started `prompts` in its four slots."""
    driven = DrivenProposer(draft, tree_nodes=tree_nodes)
    driven.start(prompts())
    return driven


def sampled_proposal(draft: DraftModel) -> Proposal:
    """One proposal at temperature 1 after a prompt of six random tokens."""
    driven = DrivenProposer(draft, num_slots=1)
    driven.start({0: (random_sample("a", 9, num_taps=len(draft.describe().taps)), 6)})
    return driven.propose([0], SAMPLED)


def check_same_proposals(found: DraftModel, expected: DraftModel) -> None:
    """Check that two drafts propose the same tokens, with probabilities and confidence equal up to rounding.

    Weights that lie elsewhere in memory are summed in another order (testing/shifted.py).
    """
    _check_near(sampled_proposal(found), 0, sampled_proposal(expected), 0, 1e-6)


def check_batched_as_alone(
    draft: DraftModel,
    sampling: Sampling,
    *,
    limits: Sequence[int] | None = None,
    atol: float = 1e-6,
    tree_nodes: int | None = None,
) -> Proposal:
    """Check that four slots propose what each proposes alone, and three again after commits of several lengths.

    Returns the four's first proposal, limited by `limits`.
    """
    committed = {0: 3, 1: 1, 3: 5}
    together = started(draft, tree_nodes=tree_nodes)
    assert isinstance(together.proposer, Proposer)
    first = together.propose(range(4), sampling, limits=limits)
    together.accept(committed)
    second = together.propose(list(committed), sampling)
    for slot in range(4):
        alone = DrivenProposer(draft, tree_nodes=tree_nodes)
        alone.start({slot: prompts()[slot]})
        _check_near(alone.propose([slot], sampling, limits=[int(first.lengths[slot])]), 0, first, slot, atol)
        if slot in committed:
            alone.accept({slot: committed[slot]})
            row = list(committed).index(slot)
            _check_near(alone.propose([slot], sampling), 0, second, row, atol)
    return first


def check_best_tree(
    proposal: Proposal, row: int, after: Callable[[tuple[int, ...]], Tensor], *, nodes: int, longest: int
) -> None:
    """Check that a slot's tree has the `nodes` most probable paths of at most `longest` tokens.

    after(path) gives the draft's probabilities [V] of the token that follows these tokens.
    """
    assert proposal.parents is not None, "a chain"
    assert int(proposal.lengths[row]) == nodes
    paths: dict[tuple[int, ...], float] = {(): 1.0}
    order: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.tokens[row].tolist(), proposal.parents[row].tolist(), strict=True):
        before = order[parent] if parent >= 0 else ()
        order.append((*before, token))
        paths[order[-1]] = paths[before] * float(after(before)[token])
    assert len(paths) == nodes + 1, "a path twice"
    assert max(map(len, paths)) <= longest
    least = min(paths.values())
    for path, probability in paths.items():
        if len(path) < longest:
            left_out = after(path).clone()
            left_out[[other[-1] for other in paths if other and other[:-1] == path]] = 0
            assert probability * float(left_out.max()) <= least * (1 + 1e-4), f"a better one after {path}"


def check_reused_slot(draft: DraftModel, *, freed: bool = True) -> None:
    """Check that a slot that held another sequence, freed or not, proposes what a fresh slot does."""
    (sample, _), (other, _), (last, _), _ = prompts().values()
    fresh, used = DrivenProposer(draft), DrivenProposer(draft)
    used.start({0: (sample, 20), 1: (other, 21)})
    if freed:
        used.proposer.free(torch.tensor([1]))
    for one in (fresh, used):
        one.start({1: (last, 3)})
    _check_near(used.propose([1], SAMPLED), 0, fresh.propose([1], SAMPLED), 0, 1e-6)


def _check_near(found: Proposal, row: int, expected: Proposal, expected_row: int, atol: float) -> None:
    """Check that both are equal up to the proposal's length. What comes after it is undefined."""
    length = int(found.lengths[row])
    assert length == expected.lengths[expected_row]
    assert torch.equal(found.tokens[row, :length], expected.tokens[expected_row, :length])
    assert (found.parents is None) == (expected.parents is None), "a tree and a chain"
    if found.parents is not None and expected.parents is not None:
        assert torch.equal(found.parents[row, :length], expected.parents[expected_row, :length])
    for name in ("probabilities", "confidence"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine[row, :length], theirs[expected_row, :length], rtol=0, atol=atol)
