"""What a row is must not depend on padding, on how batches are cut, or on the samples beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from deepspec_core.contracts.draft import DraftBatch, DraftModel, PreparedSample, Sample
from deepspec_core.contracts.rows import Rows
from deepspec_core.errors import ConfigError
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import DFlashOptions
from deepspec_targets.qwen3 import Qwen3Adapter

MakeModel, MakeSample, MakeBatch = Callable[..., DFlashModel], Callable[..., Sample], Callable[..., DraftBatch]
GAPS = [0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1]


@pytest.fixture
def model(make_model: MakeModel) -> DFlashModel:
    return make_model()


@pytest.fixture
def prepared(model: DFlashModel, make_sample: MakeSample) -> list[PreparedSample]:
    samples = [
        make_sample("long", 40, seed=1),
        make_sample("gaps", 18, GAPS, seed=2),
        make_sample("few", 9, [0, 0, 0, 0, 0, 1, 1, 1, 0], seed=3),
        make_sample("none", 6, [0] * 6, seed=4),
    ]
    return [model.preparation.prepare(sample, np.random.default_rng(i)) for i, sample in enumerate(samples)]


def _same(found: Rows, expected: Rows, blocks_before: int = 0) -> None:
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=0, atol=1e-6 * expected.hidden.abs().max().item())
    assert found.target_hidden is not None
    assert expected.target_hidden is not None
    torch.testing.assert_close(
        found.target_hidden[found.target_index], expected.target_hidden[expected.target_index], rtol=0, atol=0
    )
    assert torch.equal(found.target_ids, expected.target_ids)
    assert torch.equal(found.slot, expected.slot)
    assert torch.equal(found.block - blocks_before, expected.block)
    assert torch.equal(found.weight, expected.weight)


def _part(rows: Rows, keep: torch.Tensor) -> Rows:
    return Rows(
        hidden=rows.hidden[keep],
        target_hidden=rows.target_hidden,
        target_index=None if rows.target_index is None else rows.target_index[keep],
        target_ids=rows.target_ids[keep],
        weight=rows.weight[keep],
        slot=rows.slot[keep],
        block=rows.block[keep],
    )


@pytest.mark.parametrize("filler", [0.0, float("nan")])
def test_padding_does_not_matter(
    model: DFlashModel, prepared: list[PreparedSample], make_batch: MakeBatch, filler: float
) -> None:
    tight = model(make_batch(model, prepared))
    padded = model(make_batch(model, prepared, extra=13, filler=filler))
    assert len(tight.hidden) > 20
    assert tight.hidden.std() > 0.1, "outputs large enough for a tolerance of 1e-6 to mean something"
    _same(padded, tight)
    model.zero_grad()
    model.logits(padded.hidden).logsumexp(-1).sum().backward()
    assert all(part.grad.isfinite().all() for part in model.parameters() if part.grad is not None)


def test_batch_split_does_not_matter(model: DFlashModel, prepared: list[PreparedSample], make_batch: MakeBatch) -> None:
    together = model(make_batch(model, prepared))
    blocks = 0
    for one in prepared[:3]:
        alone = model(make_batch(model, [one]))
        count = len(one.tensors["anchors"])
        _same(_part(together, (together.block >= blocks) & (together.block < blocks + count)), alone, blocks)
        blocks += count
    assert blocks == int(together.block.max()) + 1


def test_gradients_do_not_depend_on_the_batch_split(
    model: DFlashModel, prepared: list[PreparedSample], make_batch: MakeBatch
) -> None:
    def gradients(batches: list[list[PreparedSample]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in batches:
            rows = model(make_batch(model, part))
            cross_entropy(model.logits(rows.hidden), rows.target_ids, reduction="sum").backward()
        return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}

    together, apart = gradients([prepared]), gradients([[one] for one in prepared])
    assert together.keys() == apart.keys()
    assert together.keys() == {name for name, part in model.named_parameters() if part.requires_grad}
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_only_live_blocks_enter_the_backbone(
    model: DFlashModel, prepared: list[PreparedSample], make_batch: MakeBatch
) -> None:
    shapes: list[torch.Size] = []
    hook = model.backbone.draft_layers()[0].mlp.register_forward_hook(lambda _m, args, _o: shapes.append(args[0].shape))
    model(make_batch(model, prepared))
    hook.remove()
    assert shapes == [(sum(len(one.tensors["anchors"]) for one in prepared), 4, 32)]


def test_a_batch_without_anchors_has_no_rows_but_a_whole_graph(
    model: DFlashModel, make_sample: MakeSample, make_batch: MakeBatch
) -> None:
    none = model.preparation.prepare(make_sample("none", 6, [0] * 6), np.random.default_rng(0))
    rows = model(make_batch(model, [none, none]))
    assert rows.hidden.shape == (0, 32)
    assert rows.target_hidden.shape == (0, 32)
    assert len(rows.weight) == len(rows.target_ids) == len(rows.block) == 0
    rows.hidden.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any()


def test_embedding_and_head_are_the_targets_and_frozen(model: DFlashModel) -> None:
    assert isinstance(model, DraftModel)
    assert not any(p.requires_grad for p in (*model.embed_tokens.parameters(), *model.lm_head.parameters()))
    model.adopt(torch.ones(64, 32), torch.full((64, 32), 2.0))
    assert (model.embed_tokens.weight == 1).all()
    assert (model.heads().draft == 2).all()
    assert model.heads().target is model.heads().draft


def test_autocast_rounds_and_nothing_else(
    model: DFlashModel, prepared: list[PreparedSample], make_batch: MakeBatch
) -> None:
    batch = make_batch(model, prepared)
    exact = model(batch).hidden
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = model(batch)
        logits = model.logits(rows.hidden)
    difference = (rows.hidden - exact).abs()
    assert difference.max() > 0
    assert difference.mean() < 0.02
    logits.float().logsumexp(-1).sum().backward()
    assert all(part.grad.isfinite().all() for part in model.parameters() if part.grad is not None)


def test_softcap_applies_to_logits(model: DFlashModel) -> None:
    hidden = torch.randn(3, 32)
    plain = model.logits(hidden)
    model.softcap = 0.5
    torch.testing.assert_close(model.logits(hidden), 0.5 * torch.tanh(plain / 0.5))
    assert model.heads().softcap == 0.5


@pytest.mark.parametrize(("mask_token_id", "expected"), [(None, "no mask token"), (64, "not in the target's")])
def test_mask_token_must_exist(adapter: Qwen3Adapter, mask_token_id: int | None, expected: str) -> None:
    assert adapter.architecture.mask_token_id is None
    with pytest.raises(ConfigError, match=expected) as error:
        DFlashModel(DFlashOptions(mask_token_id=mask_token_id, num_layers=1), adapter, (0, 1))
    assert error.value.where == "[draft] mask_token_id"


@pytest.mark.parametrize("bad", [{"block_size": 0}, {"num_layers": -1}, {"num_anchors": 0}, {"mask_token_id": -1}])
def test_options_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DFlashOptions(**bad)
