"""What every trained draft and every loss term keeps, kept by DFlash 2, with each of its parts and without.

Legend: N rows, V vocabulary, C candidates.
"""

from typing import Any

import deepspec_dflash2.plugin
import pytest
import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.rows import Rows
from deepspec_core.testing import DraftModelSuite, LossSuite, broken_by

SMALL = {
    "block_size": 5, "num_layers": 1, "num_anchors": 8, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 7,
}  # fmt: skip
SHAPES = {
    "the anchor's slot predicts": {"anchor_predicts": True, "block_size": 4},
    "no convolutions": {"conv_kernel_size": 0},
    "no selector": {"selector_top_k": 0},
    "a reduced vocabulary": {"vocab_size": 24},
    "more candidates than tokens": {"vocab_size": 24, "selector_top_k": 40},
}
# Clauses that depend on the shape of a draft.
SHAPED = (
    "test_padding_does_not_matter",
    "test_gradients_do_not_depend_on_the_batch",
    "test_decoding_sees_what_training_sees",
    "test_a_checkpoint_is_the_same_draft",
    "test_slots_do_not_see_each_other",
    "test_trees_do_not_see_each_other",
)


class TestDFlash2(DraftModelSuite):
    component = "dflash2"
    plugin = deepspec_dflash2.plugin
    options = SMALL

    def draft(self) -> DraftModel:
        """With large random weights, but the target's lm_head: the scores of a label read rows of the whole head."""
        draft = super().draft()
        draft.adopt(torch.as_tensor(draft.embed_tokens.weight), torch.randn(64, 32) * 32**-0.5)
        return draft

    def proposed(self, draft: DraftModel, rows: Rows) -> Tensor:
        """The selector's, over the candidates."""
        if not rows.extras:
            return super().proposed(draft, rows)
        scores_NC, tokens_NC = rows.extras["selector_scores"].detach(), rows.extras["selector_tokens"]
        return torch.zeros(len(scores_NC), 64).scatter(1, tokens_NC, scores_NC.softmax(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes(shape: str) -> None:
    class Shape(TestDFlash2):
        options = SMALL | SHAPES[shape]

    assert broken_by(Shape, SHAPED) == {}


class TestSelectorLoss(LossSuite):
    component = "selector"
    plugin = deepspec_dflash2.plugin

    def made(self, term: Any, **changes: Any) -> Any:
        """Five candidates a row, the label among them."""
        made = super().made(term, **changes)
        generator = torch.Generator().manual_seed(changes.get("seed", 0))
        scores_NC = torch.randn(len(made.ids_N), 5, generator=generator).requires_grad_()
        tokens_NC = made.ids_N[:, None] + torch.arange(5) - 2
        return evolve(made, extras={"selector_scores": scores_NC, "selector_tokens": tokens_NC})
