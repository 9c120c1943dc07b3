"""What a row is must not depend on padding, cutting, packing, how batches are cut, or the samples beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from deepspec_core.config.schema import LossOptions
from deepspec_core.contracts.draft import DraftBatch, Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import RowResult, build_engine
from deepspec_core.testing.draft_checks import (
    check_all_near,
    check_same_rows,
    gradients_of,
    rows_where,
    trained,
)
from deepspec_core.testing.random_batches import features_of, padded_batch, prepare, ragged_samples, random_sample
from deepspec_eagle3.model import Eagle3Model
from deepspec_eagle3.options import Eagle3Options
from deepspec_eagle3.preparation import counted_steps

MakeModel = Callable[..., Eagle3Model]
NEAR, NEAR_GRADIENT = 2e-6, 2e-5


@pytest.fixture
def model(make_model: MakeModel) -> Eagle3Model:
    return make_model()


@pytest.fixture
def samples() -> list[Sample]:
    return ragged_samples()


def _batch(model: Eagle3Model, samples: Sequence[Sample], **layout: Any) -> DraftBatch:
    return padded_batch(model, prepare(model, samples), **layout)


def _loss(model: Eagle3Model, registry: Registry, batch: DraftBatch) -> RowResult:
    return build_engine(LossOptions(terms={"soft_ce": 1.0}), registry)(model(batch), model.heads(), with_metrics=True)


def test_counted_steps_by_hand() -> None:
    mask = torch.tensor([0, 1, 1, 0, 1, 1])
    assert counted_steps(mask, 3).int().tolist() == [
        [0, 1, 1],
        [1, 1, 0],
        [1, 0, 1],
        [0, 1, 0],  # the last token of a sequence counts nowhere
        [1, 0, 0],
        [0, 0, 0],
    ]


def test_rows_by_hand(model: Eagle3Model) -> None:
    sample = random_sample("a", 6, [0, 1, 1, 0, 1, 1])
    rows = model(_batch(model, [sample]))
    assert list(zip(rows.block.tolist(), rows.slot.tolist(), strict=True)) == [
        (0, 1), (0, 2), (1, 0), (1, 1), (1, 3), (2, 0), (2, 2), (3, 1), (4, 0),
    ]  # fmt: skip
    index = rows.block  # every index has a row here
    torch.testing.assert_close(rows.weight, 0.8**rows.slot / 6)
    assert rows.denominator == 1
    assert rows.target_ids is None
    assert rows.target_hidden is not None
    assert len(rows.target_hidden) == 3, "each position once"
    assert torch.equal(rows.target_hidden[rows.target_index], features_of(sample).last_hidden[index + 1 + rows.slot])


def test_padded_batch_divides_by_every_position(make_model: MakeModel, samples: list[Sample]) -> None:
    model = make_model(normaliser="padded_batch")
    rows = model(_batch(model, samples, extra=2))
    assert rows.denominator == 4 * 42
    torch.testing.assert_close(rows.weight, 0.8**rows.slot)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_batch_split_does_not_matter(
    make_model: MakeModel, samples: list[Sample], registry: Registry, num_layers: int
) -> None:
    model = make_model(num_layers=num_layers)
    batch = _batch(model, samples)
    rows, document = model(batch), batch.prepared["document"]
    for index, sample in enumerate(samples[:3]):
        check_same_rows(rows_where(rows, document == index), model(_batch(model, [sample])), NEAR)
    together = _loss(model, registry, batch)
    apart = [_loss(model, registry, _batch(model, [sample])) for sample in samples]
    total, denominator = sum(one.total for one in apart), sum(one.denominator for one in apart)
    assert denominator == together.denominator == 4
    torch.testing.assert_close(total, together.total)
    check_all_near(gradients_of(total, model), gradients_of(together.total, model), NEAR_GRADIENT)


def test_order_of_samples_does_not_matter(model: Eagle3Model, samples: list[Sample], registry: Registry) -> None:
    forward = _loss(model, registry, _batch(model, samples))
    backward = _loss(model, registry, _batch(model, samples[::-1]))
    torch.testing.assert_close(forward.total, backward.total)
    assert forward.metrics.keys() == backward.metrics.keys()
    for name, pair in forward.metrics.items():
        torch.testing.assert_close(torch.stack(pair), torch.stack(backward.metrics[name]), msg=name)


def test_cutting_after_the_last_supervised_token_does_not_matter(model: Eagle3Model) -> None:
    whole = random_sample("a", 20, [0] * 5 + [1] * 7 + [0] * 8)
    features = features_of(whole)
    cut = evolve(
        whole,
        input_ids=whole.input_ids[:13],
        loss_mask=whole.loss_mask[:13],
        features=TargetFeatures(hidden=features.hidden[:13], last_hidden=features.last_hidden[:13]),
    )
    check_same_rows(model(_batch(model, [cut])), model(_batch(model, [whole])), NEAR)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("with_positions", [True, False])
def test_packed_documents_are_what_they_are_alone(
    make_model: MakeModel,
    samples: list[Sample],
    registry: Registry,
    num_layers: int,
    with_positions: bool,
) -> None:
    """Every document is supervised to its last token or beside its neighbour's first, and one counts nothing."""
    model = make_model(num_layers=num_layers)
    order = [1, 0, 3, 2]
    packed = _batch(model, samples, extra=3, filler=float("nan"), rows=[[1, 0], [3, 2]])
    if not with_positions:
        packed = evolve(packed, position_ids=None)
    alone = _batch(model, [samples[index] for index in order])
    check_same_rows(model(packed), model(alone), NEAR)
    together, apart = _loss(model, registry, packed), _loss(model, registry, alone)
    assert together.denominator == apart.denominator == 4
    torch.testing.assert_close(together.total, apart.total)
    check_all_near(gradients_of(together.total, model), gradients_of(apart.total, model), NEAR_GRADIENT)


def test_document_boundaries_matter(model: Eagle3Model, samples: list[Sample]) -> None:
    """The packing test could not pass if documents were ignored: the second would see the first."""
    packed = _batch(model, samples[:2], rows=[[0, 1]])
    one = dict(packed.prepared)
    for kind in ("", "later_"):
        document = one[f"{kind}document"]
        one[f"{kind}index"] = one[f"{kind}index"] + document * len(samples[0].input_ids)
        one[f"{kind}document"] = torch.zeros_like(document)
    one["target_document"] = torch.zeros_like(one["target_document"])
    found = model(evolve(packed, document_ids=None, position_ids=None, prepared=one)).hidden
    second = packed.prepared["document"] == 1
    expected = model(packed).hidden
    torch.testing.assert_close(found[~second], expected[~second], rtol=0, atol=1e-5)
    assert (found[second] - expected[second]).abs().mean() > 0.05


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_sequences(model: Eagle3Model, registry: Registry, length: int) -> None:
    """Two tokens have nothing to predict but the first step's; one has nothing at all. The steps outlast them all."""
    sample = random_sample("a", length)
    result = _loss(model, registry, _batch(model, [sample]))
    rows = model(_batch(model, [sample]))
    # mask 0 1 1 with the last cleared leaves index 1: reached by index 1 at step 0 and by index 0 at step 1.
    assert len(rows.hidden) == {1: 0, 2: 0, 3: 2}[length]
    assert result.total.isfinite()
    assert result.denominator == 1


def test_a_batch_without_supervised_tokens_has_no_rows_but_a_whole_graph(
    model: Eagle3Model, registry: Registry
) -> None:
    none = random_sample("none", 6, [0] * 6)
    rows = model(_batch(model, [none, none]))
    assert rows.hidden.shape == rows.target_hidden.shape == (0, 32)
    result = _loss(model, registry, _batch(model, [none, none]))
    assert result.denominator == 2, "they are sequences all the same"
    gradients = gradients_of(result.total, model)
    assert gradients.keys() == trained(model).keys()
    assert not any(gradient.any() for gradient in gradients.values())
    assert model.preparation.prepare(none, np.random.default_rng(0)).counts == {
        "supervised_predictions": 0,
        "samples_without_predictions": 1,
    }


def test_the_first_layer_sees_tokens_beside_a_stream_of_hidden_states(make_model: MakeModel) -> None:
    model = make_model(num_layers=2, taps=(1, 4))
    first, second = model.drafter.draft_layers()
    assert first.attention.query.weight.shape[1] == 64
    assert second.attention.query.weight.shape[1] == 32
    assert model.drafter.fc.weight.shape == (32, 64)
    rotary = model.drafter.rotary(torch.zeros(1, 1, 32), torch.zeros(1, 1))
    with torch.no_grad():
        for layer in (first, second):
            layer.mlp.down_proj.weight.zero_()
        hidden = torch.randn(1, 1, 32)
        output = model.drafter(hidden, torch.randn(1, 1, 32), rotary, lambda _layer, q, _k, _v: torch.zeros_like(q))
    assert torch.equal(output, hidden), "zeros are added, which changes no bit"


def test_later_steps_run_over_supervised_indices_only(model: Eagle3Model) -> None:
    """Two supervised tokens are predicted from the indices up to three before them; padding costs step 0 only."""
    samples = [random_sample("a", 30, [0] * 20 + [1, 1] + [0] * 8), random_sample("b", 8, [0] * 8)]
    shapes: list[tuple[int, ...]] = []
    hook = model.drafter.draft_layers()[0].mlp.register_forward_hook(
        lambda _m, args, _o: shapes.append(tuple(args[0].shape))
    )
    model(_batch(model, samples))
    hook.remove()
    assert shapes == [(2, 30, 32), *[(1, 4, 32)] * 3]


def test_any_number_of_taps(make_model: MakeModel) -> None:
    model = make_model(taps=(3,))
    assert len(model(_batch(model, [random_sample("a", 12, num_taps=1)])).hidden) > 0


def test_without_query_and_key_norms(make_model: MakeModel) -> None:
    assert not any(
        "query_norm" in name or "key_norm" in name for name, _ in make_model(qk_norm=False).named_parameters()
    )
    assert any("query_norm" in name for name, _ in make_model().named_parameters())


@pytest.mark.parametrize(
    "bad",
    [
        {"ttt_length": 0},
        {"step_decay": 0.0},
        {"step_decay": 1.5},
        {"num_layers": 0},
        {"normaliser": "tokens"},
        {"qk_norm": "no"},
    ],
)
def test_options_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        Eagle3Options(**bad)  # type: ignore[arg-type]
