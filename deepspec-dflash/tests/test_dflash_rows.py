"""What a row is must not depend on padding, on how batches are cut, or on the samples beside it."""

from __future__ import annotations

import pytest
import torch

from deepspec_core.contracts.draft import PreparedSample
from deepspec_core.errors import ConfigError
from deepspec_core.testing.draft_checks import (
    gradients_of,
    trained,
)
from deepspec_core.testing.random_batches import padded_batch, prepare, ragged_samples
from deepspec_core.testing.recorded import Recordings
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import DFlashOptions


@pytest.fixture
def prepared(model: DFlashModel) -> list[PreparedSample]:
    return prepare(model, ragged_samples())


def test_only_live_blocks_enter_the_backbone(model: DFlashModel, prepared: list[PreparedSample]) -> None:
    shapes: list[torch.Size] = []
    hook = model.backbone.draft_layers()[0].mlp.register_forward_hook(lambda _m, args, _o: shapes.append(args[0].shape))
    model(padded_batch(model, prepared))
    hook.remove()
    assert shapes == [(sum(len(one.tensors["anchors"]) for one in prepared), 4, 32)]


def test_a_batch_without_anchors_has_no_rows_but_a_whole_graph(model: DFlashModel) -> None:
    none = prepare(model, ragged_samples()[3:])
    rows = model(padded_batch(model, none * 2))
    assert rows.hidden.shape == rows.target_hidden.shape == (0, 32)
    assert len(rows.weight) == len(rows.target_ids) == len(rows.block) == 0
    gradients = gradients_of(rows.hidden.sum(), model)
    assert gradients.keys() == trained(model).keys()
    assert not any(gradient.any() for gradient in gradients.values())


def test_softcap_applies_to_logits(model: DFlashModel) -> None:
    hidden = torch.randn(3, 32)
    plain = model.logits(hidden)
    model.softcap = 0.5
    torch.testing.assert_close(model.logits(hidden), 0.5 * torch.tanh(plain / 0.5))
    assert model.heads().softcap == 0.5


@pytest.mark.parametrize(("mask_token_id", "expected"), [(None, "no mask token"), (64, "not in the target's")])
def test_mask_token_must_exist(recordings: Recordings, mask_token_id: int | None, expected: str) -> None:
    adapter = recordings.adapter("qwen3")
    assert adapter.architecture.mask_token_id is None
    with pytest.raises(ConfigError, match=expected) as error:
        DFlashModel(DFlashOptions(mask_token_id=mask_token_id, num_layers=1), adapter, (0, 1))
    assert error.value.where == "[draft] mask_token_id"


@pytest.mark.parametrize("bad", [{"block_size": 0}, {"num_layers": -1}, {"num_anchors": 0}, {"mask_token_id": -1}])
def test_options_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DFlashOptions(**bad)
