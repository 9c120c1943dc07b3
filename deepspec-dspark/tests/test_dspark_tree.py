"""Trees by the conditional distributions of every path: the best there are, the same alone and in a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.testing.driven_proposer import (
    SAMPLED,
    check_best_tree,
    prompts,
    started,
)
from deepspec_core.testing.random_batches import padded_batch
from deepspec_dspark.model import DSparkModel

MakeModel = Callable[..., DSparkModel]
NODES = 10
SHAPES = [
    {"head": "vanilla"},
    {"head": "gated", "confidence_head": False},
    {"head": "rnn"},
    {"head": "rnn", "anchor_predicts": False, "block_size": 5},
    {"rank": 0, "confidence_with_markov": False},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_has_the_most_probable_paths_as_training_sees_them(
    make_model: MakeModel, shape: dict[str, object]
) -> None:
    """What follows a path is what teacher forcing gives after the same tokens, to no slot the path does not reach."""
    model = make_model(**shape)
    for slot, (sample, anchor) in list(prompts().items())[:2]:

        def after(path: tuple[int, ...], sample=sample, anchor=anchor) -> Tensor:
            given = sample.input_ids.clone()
            given[anchor + 1 : anchor + 1 + len(path)] = torch.tensor(path, dtype=torch.long)
            prepared = model.preparation.at(evolve(sample, input_ids=given), torch.tensor([anchor]))
            rows = model(padded_batch(model, [prepared]))
            logits = model.logits(rows.hidden)
            if rows.correction is not None:
                logits = logits + rows.correction @ model.heads().correction.T
            return logits.softmax(-1)[len(path)].detach()

        tree = started(model, tree_nodes=NODES).propose([slot], SAMPLED)
        assert tree.confidence is None
        check_best_tree(tree, 0, after, nodes=NODES, longest=4)
