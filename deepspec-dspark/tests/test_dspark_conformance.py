"""What every trained draft keeps, kept by DSpark: in training, in checkpoints, in chains and trees."""

import pytest

import deepspec_dspark.plugin
from deepspec_core.testing import DraftModelSuite, broken_by
from deepspec_dspark.options import MarkovOptions

SMALL = {"block_size": 4, "num_layers": 1, "num_anchors": 8}
SHAPES = [
    {"markov": MarkovOptions(rank=6), "vocab_size": 24},
    {"markov": MarkovOptions(rank=6, head="gated"), "confidence_head": False},
    {"markov": MarkovOptions(rank=6, head="rnn"), "anchor_predicts": False, "block_size": 5},
    {"markov": MarkovOptions(rank=0), "confidence_with_markov": False},
]
# Clauses that depend on the shape of a draft.
SHAPED = (
    "test_padding_does_not_matter",
    "test_gradients_do_not_depend_on_the_batch",
    "test_decoding_sees_what_training_sees",
    "test_a_checkpoint_is_the_same_draft",
    "test_slots_do_not_see_each_other",
    "test_trees_do_not_see_each_other",
)


class TestDSpark(DraftModelSuite):
    component = "dspark"
    plugin = deepspec_dspark.plugin
    options = SMALL | {"markov": MarkovOptions(rank=6, head="rnn")}


@pytest.mark.parametrize(
    "shape",
    [SHAPES[0], *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[1:])],
    ids=lambda shape: shape["markov"].head + str(shape["markov"].rank),
)
def test_other_shapes(shape: dict[str, object]) -> None:
    class Shape(TestDSpark):
        options = SMALL | shape

    assert broken_by(Shape, SHAPED) == {}
