"""Trees of a block's distributions: the best there are, the same alone and in a batch, cut to limits."""

from __future__ import annotations

import pytest

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.testing.driven_proposer import (
    GREEDY,
    SAMPLED,
    check_batched_as_alone,
    check_best_tree,
    started,
)
from deepspec_dflash.model import DFlashModel

NODES = 12


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_batched_equals_one_at_a_time(model: DFlashModel, sampling: Sampling) -> None:
    check_batched_as_alone(model, sampling, tree_nodes=NODES)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(temperature=0.5)], ids=str)
def test_a_tree_has_the_blocks_most_probable_paths(model: DFlashModel, sampling: Sampling) -> None:
    """By the distributions that a chain of the same draft is drawn from; of a greedy one, those at temperature 1."""
    block = started(model).propose(range(4), sampling if sampling.temperature else SAMPLED).probabilities
    trees = started(model, tree_nodes=NODES).propose(range(4), sampling)
    assert block is not None
    assert trees.confidence is None
    for slot in range(4):
        check_best_tree(trees, slot, lambda path, slot=slot: block[slot, len(path)], nodes=NODES, longest=4)


def test_limits_cut_paths_not_the_block(model: DFlashModel) -> None:
    driven, block = started(model, tree_nodes=NODES), started(model).propose(range(4), SAMPLED).probabilities
    trees = driven.propose([0, 1], SAMPLED, limits=[2, 0])
    assert block is not None
    check_best_tree(trees, 0, lambda path: block[0, len(path)], nodes=NODES, longest=2)
    assert trees.lengths.tolist() == [NODES, 0]
