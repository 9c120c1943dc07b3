"""What every trained draft keeps, kept by Eagle3: in training, in its checkpoints and while decoding."""

import pytest

import deepspec_eagle3.plugin
from deepspec_core.testing import DraftModelSuite, broken_by

SMALL = {"ttt_length": 4}
# Clauses that depend on the shape of a draft.
SHAPED = (
    "test_padding_does_not_matter",
    "test_neighbours_do_not_matter",
    "test_gradients_do_not_depend_on_the_batch",
    "test_decoding_sees_what_training_sees",
    "test_a_checkpoint_is_the_same_draft",
    "test_slots_do_not_see_each_other",
)


class TestEagle3(DraftModelSuite):
    component = "eagle3"
    plugin = deepspec_eagle3.plugin
    options = SMALL


@pytest.mark.parametrize(
    "shape", [{"vocab_size": 24, "qk_norm": False}, pytest.param({"num_layers": 2}, marks=pytest.mark.slow)], ids=str
)
def test_other_shapes(shape: dict[str, object]) -> None:
    class Shape(TestEagle3):
        options = SMALL | shape

    assert broken_by(Shape, SHAPED) == {}
