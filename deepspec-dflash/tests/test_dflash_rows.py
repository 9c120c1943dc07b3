"""What a row is must not depend on padding, on how batches are cut, or on the samples beside it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from deepspec_core.contracts.draft import PreparedSample
from deepspec_core.errors import ConfigError
from deepspec_core.testing.draft_checks import (
    check_all_near,
    check_autocast,
    check_frozen_heads,
    check_same_rows,
    gradients_of,
    rows_where,
    trained,
)
from deepspec_core.testing.random_batches import padded_batch, prepare, ragged_samples
from deepspec_core.testing.recorded import Recordings
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import DFlashOptions


@pytest.fixture
def prepared(model: DFlashModel) -> list[PreparedSample]:
    return prepare(model, ragged_samples())


@pytest.mark.parametrize("filler", [0.0, float("nan")])
def test_padding_does_not_matter(model: DFlashModel, prepared: list[PreparedSample], filler: float) -> None:
    tight = model(padded_batch(model, prepared))
    padded = model(padded_batch(model, prepared, extra=13, filler=filler))
    assert len(tight.hidden) > 20
    assert tight.hidden.std() > 0.1, "outputs large enough for a tolerance of 1e-6 to mean something"
    check_same_rows(padded, tight, 1e-6)
    assert torch.equal(padded.block, tight.block)
    gradients = gradients_of(model.logits(padded.hidden).logsumexp(-1).sum(), model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_batch_split_does_not_matter(model: DFlashModel, prepared: list[PreparedSample]) -> None:
    together = model(padded_batch(model, prepared))
    blocks = 0
    for one in prepared[:3]:
        count = len(one.tensors["anchors"])
        part = rows_where(together, (together.block >= blocks) & (together.block < blocks + count))
        assert part.block[0] == blocks
        check_same_rows(part, model(padded_batch(model, [one])), 1e-6)
        blocks += count
    assert blocks == int(together.block.max()) + 1


def test_gradients_do_not_depend_on_the_batch_split(model: DFlashModel, prepared: list[PreparedSample]) -> None:
    def gradients(batches: list[list[PreparedSample]]) -> dict[str, torch.Tensor]:
        rows = [model(padded_batch(model, part)) for part in batches]
        losses = [cross_entropy(model.logits(one.hidden), one.target_ids, reduction="sum") for one in rows]
        return gradients_of(sum(losses), model)

    together, apart = gradients([prepared]), gradients([[one] for one in prepared])
    assert together.keys() == trained(model).keys()
    check_all_near(apart, together, 1e-5)


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


def test_embedding_and_head_are_the_targets_and_frozen(model: DFlashModel) -> None:
    check_frozen_heads(model)


def test_autocast_rounds_and_nothing_else(model: DFlashModel, prepared: list[PreparedSample]) -> None:
    check_autocast(model, padded_batch(model, prepared), mean=0.02)


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
