"""Trees by their definitions: which node sees which, what a walk commits, and which tree is the best."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.best_first import best_first, log_probabilities
from deepspec_core.decoding.sampling import distribution
from deepspec_core.decoding.tree import seen_columns, verify_tree
from deepspec_core.decoding.verify import Verdict

GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.0)
# The root's children are nodes 0 and 1; 2 and 3 are those of 1; 4 is that of 2.
PARENTS = [-1, -1, 1, 1, 2]


def ancestors(parents: list[int], node: int) -> set[int]:
    return set() if node < 0 else {node} | ancestors(parents, parents[node])


@pytest.mark.parametrize("parents", [[], [-1], PARENTS, [-1, *range(8)], [-1] * 9, [-1, 0, 0, 1, 3, 4, 5, 2, 7]])
def test_a_node_sees_itself_and_its_ancestors(parents: list[int]) -> None:
    seen_TT = seen_columns(torch.tensor([parents]).long().reshape(1, -1))[0]
    for column, row in enumerate(seen_TT.tolist()):
        assert {other for other, sees in enumerate(row) if sees} == {0} | {
            node + 1 for node in ancestors(parents, column - 1)
        }


def _walk(best: list[int], tokens: list[int], *, stop_ids: tuple[int, ...] = (), length: int = 5, depth: int = 3):
    """The greedy verdict where `best` are the target's tokens after the last committed one and each node."""
    logits = torch.nn.functional.one_hot(torch.tensor([best]), 10).float()
    proposal = Proposal(tokens=torch.tensor([tokens]), lengths=torch.tensor([length]), parents=torch.tensor([PARENTS]))
    return _verify(logits, proposal, depth, stop_ids)


def _verify(logits: Tensor, proposal: Proposal, depth: int, stop_ids: tuple[int, ...] = ()) -> Verdict:
    assert proposal.parents is not None
    depths = seen_columns(proposal.parents).sum(2) - 1
    uniforms = torch.zeros(len(logits), depth + 1)
    return verify_tree(logits, proposal, depths, sampling=GREEDY, uniforms=uniforms, stop_ids=stop_ids)


def test_a_walk_follows_the_targets_own_tokens() -> None:
    verdict = _walk([4, 9, 5, 6, 9, 7], [3, 4, 5, 8, 6])
    # 4 is node 1, then 5 is node 2, then 6 is node 4, whose own token is 7: the target's.
    assert verdict.tokens.tolist() == [[4, 5, 6, 7]]
    assert (int(verdict.accepted), int(verdict.committed), int(verdict.proposal_lengths)) == (3, 4, 3)
    assert verdict.path is not None
    assert verdict.path.tolist() == [[0, 2, 3, 5]]


@pytest.mark.parametrize(
    ("length", "depth", "committed"),
    [(5, 3, [4, 5, 6, 7]), (5, 1, [4, 5]), (4, 3, [4, 5, 6]), (2, 3, [4, 5]), (1, 3, [4]), (0, 3, [4])],
)
def test_a_walk_stays_among_the_proposed_nodes(length: int, depth: int, committed: list[int]) -> None:
    verdict = _walk([4, 9, 5, 6, 9, 7], [3, 4, 5, 8, 6], length=length, depth=depth)
    assert verdict.tokens[0, : int(verdict.committed)].tolist() == committed
    assert int(verdict.accepted) == len(committed) - 1
    assert int(verdict.proposal_lengths) == {5: 3, 4: 2, 2: 1, 1: 1, 0: 0}[length]


def test_a_walk_ends_at_an_accepted_stop_token() -> None:
    verdict = _walk([4, 9, 5, 6, 9, 7], [3, 4, 5, 8, 6], stop_ids=(5,))
    assert verdict.tokens[0, : int(verdict.committed)].tolist() == [4, 5]
    assert (int(verdict.accepted), int(verdict.proposal_lengths)) == (2, 2)


def test_a_chain_as_a_tree_commits_what_the_chain_does() -> None:
    from deepspec_core.decoding.verify import verify

    generator = torch.Generator().manual_seed(1)
    logits, tokens = torch.randn(64, 4, 5, generator=generator), torch.randint(5, (64, 3), generator=generator)
    lengths = torch.randint(4, (64,), generator=generator)
    chain = Proposal(tokens=tokens, lengths=lengths)
    tree = Proposal(tokens=tokens, lengths=lengths, parents=torch.arange(-1, 2).expand(64, 3))
    one = verify(logits, chain, sampling=GREEDY, uniforms=torch.zeros(64, 4), stop_ids=(2,))
    other = _verify(logits, tree, 3, (2,))
    assert torch.equal(one.accepted, other.accepted)
    assert torch.equal(one.committed, other.committed)
    assert torch.equal(one.proposal_lengths, other.proposal_lengths)
    for row, count in enumerate(one.committed.tolist()):
        assert torch.equal(one.tokens[row, :count], other.tokens[row, :count])


def test_every_draw_is_the_targets_own() -> None:
    """The first two tokens have exactly the target's probabilities, and a share of the draws is in the tree."""
    rows = 100_000
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 4, generator=generator)
    proposal = Proposal(
        tokens=torch.tensor([[2, 0]]).expand(rows, 2),
        parents=torch.tensor([[-1, 0]]).expand(rows, 2),
        lengths=torch.full((rows,), 2),
    )
    uniforms = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    depths = torch.tensor([[0, 1, 2]]).expand(rows, 3)
    verdict = verify_tree(logits.expand(rows, 3, 4), proposal, depths, sampling=SAMPLED, uniforms=uniforms, stop_ids=())
    first, second = logits.softmax(-1)[:2]
    assert ((torch.bincount(verdict.tokens[:, 0], minlength=4) / rows) - first).abs().max() < 0.005
    after = verdict.tokens[verdict.accepted > 0, 1]
    assert ((torch.bincount(after, minlength=4) / len(after)) - second).abs().max() < 0.01
    assert abs((verdict.accepted > 0).float().mean() - first[2]) < 0.005


def _paths(proposal: Proposal, row: int) -> set[tuple[int, ...]]:
    assert proposal.parents is not None
    paths: list[tuple[int, ...]] = []
    for token, parent in itertools.islice(
        zip(proposal.tokens[row].tolist(), proposal.parents[row].tolist(), strict=True), int(proposal.lengths[row])
    ):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("nodes", [1, 4, 9, 40])
def test_the_best_tree_has_the_most_probable_paths(nodes: int, conditional: bool) -> None:
    vocabulary, depth, batch = 4, 3, 3
    generator = torch.Generator().manual_seed(nodes)
    # Of each level, the distribution after each token before; of unconditional ones the same after all.
    tables = 2 * torch.randn(batch, depth, vocabulary if conditional else 1, vocabulary, generator=generator)
    tables = tables.log_softmax(-1).expand(-1, -1, vocabulary, -1)
    limits = torch.tensor([3, 1, 2])

    def next_tokens(level: int, tokens_BW: Tensor | None, parents_BW: Tensor | None) -> Tensor:
        if not conditional:
            return tables[:, level, :1]
        tokens_BW = torch.zeros(batch, 1, dtype=torch.long) if tokens_BW is None else tokens_BW
        return tables[:, level].gather(1, tokens_BW[..., None].expand(-1, -1, vocabulary))

    found = best_first(next_tokens, nodes=nodes, longest=depth, limits=limits)
    for row, limit in enumerate(limits.tolist()):
        scores = {}
        for length in range(1, limit + 1):
            for path in itertools.product(range(vocabulary), repeat=length):
                befores = (0, *path[:-1])
                steps = (
                    tables[row, k, before, token] for k, (before, token) in enumerate(zip(befores, path, strict=True))
                )
                scores[path] = float(sum(steps))
        expected = sorted(scores, key=lambda path: -scores[path])[:nodes]
        assert int(found.lengths[row]) == len(expected)
        assert _paths(found, row) == set(expected)


def test_impossible_tokens_are_no_nodes_and_sure_ones_follow_their_parents() -> None:
    certain = log_probabilities(torch.tensor([[[0.0, 9.0, 1.0]] * 4]), Sampling(temperature=1.0, top_k=1))
    found = best_first(lambda level, *_: certain[:, level : level + 1], nodes=8, longest=4, limits=torch.tensor([4]))
    assert found.parents is not None
    assert int(found.lengths) == 4
    assert found.tokens[0, :4].tolist() == [1, 1, 1, 1]
    assert found.parents[0, :4].tolist() == [-1, 0, 1, 2]


def test_no_room_is_an_empty_tree() -> None:
    found = best_first(lambda *_: torch.zeros(2, 1, 3), nodes=4, longest=2, limits=torch.tensor([0, 1]))
    assert found.lengths.tolist() == [0, 3]


@pytest.mark.parametrize(
    "sampling", [SAMPLED, Sampling(temperature=0.6), Sampling(temperature=1.0, top_p=0.8)], ids=str
)
def test_log_probabilities_are_those_of_the_distribution(sampling: Sampling) -> None:
    logits = 3 * torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    found = log_probabilities(logits, sampling)
    torch.testing.assert_close(found.exp(), distribution(logits, sampling))
