"""What every trained draft keeps, kept by DFlash: in training, in checkpoints, in chains and trees."""

import pytest

import deepspec_dflash.plugin
from deepspec_core.testing import DraftModelSuite, broken_by

SMALL = {"block_size": 4, "num_layers": 2, "num_anchors": 8}
# Clauses that depend on the shape of a draft.
SHAPED = (
    "test_gradients_do_not_depend_on_the_batch",
    "test_decoding_sees_what_training_sees",
    "test_a_checkpoint_is_the_same_draft",
    "test_slots_do_not_see_each_other",
)


class TestDFlash(DraftModelSuite):
    component = "dflash"
    plugin = deepspec_dflash.plugin
    options = SMALL


@pytest.mark.parametrize("shape", [{"anchor_predicts": False}, {"vocab_size": 24}], ids=str)
def test_other_shapes(shape: dict[str, object]) -> None:
    class Shape(TestDFlash):
        options = SMALL | shape

    assert broken_by(Shape, SHAPED) == {}
