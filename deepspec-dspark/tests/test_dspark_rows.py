"""Rows do not depend on padding or on how batches are cut; confidence trains what it is told to, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from deepspec_core.blocks.losses import Confidence, CrossEntropy, TotalVariation
from deepspec_core.blocks.row_engine import RowEngine
from deepspec_core.blocks.weightings import Decay
from deepspec_core.config.weighting_options import DecayOptions
from deepspec_core.contracts.draft import DraftBatch, PreparedSample, Sample
from deepspec_core.contracts.loss import LossTerm
from deepspec_core.errors import ConfigError
from deepspec_dspark.model import DSparkModel

MakeModel, MakeSample, MakeBatch = Callable[..., DSparkModel], Callable[..., Sample], Callable[..., DraftBatch]
PUBLISHED = {"ce": (CrossEntropy(), 0.1), "tv": (TotalVariation(), 0.9), "confidence": (Confidence(), 1.0)}
SHAPES = [{"head": "vanilla"}, {"head": "gated"}, {"head": "rnn"}, {"rank": 0, "confidence_with_markov": False}]
GAPS = [0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1]


def _prepared(model: DSparkModel, make_sample: MakeSample) -> list[PreparedSample]:
    samples = [
        make_sample("long", 40, seed=1),
        make_sample("gaps", 18, GAPS, seed=2),
        make_sample("few", 9, [0, 0, 0, 0, 0, 1, 1, 1, 0], seed=3),
        make_sample("none", 6, [0] * 6, seed=4),
    ]
    return [model.preparation.prepare(sample, np.random.default_rng(i)) for i, sample in enumerate(samples)]


def _gradients(
    model: DSparkModel, batches: list[DraftBatch], terms: dict[str, tuple[LossTerm, float]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The unnormalised loss over these batches and every parameter's gradient."""
    model.zero_grad()
    engine, total = RowEngine(terms, Decay(DecayOptions(gamma=4.0))), 0.0
    for batch in batches:
        result = engine(model(batch), model.heads())
        result.total.backward()
        total += result.total.item()
    return total, {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_padding_nor_the_batch_split_matters(
    make_model: MakeModel, make_sample: MakeSample, make_batch: MakeBatch, shape: dict[str, object]
) -> None:
    model = make_model(**shape)
    prepared = _prepared(model, make_sample)
    total, expected = _gradients(model, [make_batch(model, prepared)], PUBLISHED)
    assert expected.keys() == {name for name, part in model.named_parameters() if part.requires_grad}
    assert all(gradient.any() for gradient in expected.values())
    padded = [make_batch(model, prepared, extra=13, filler=float("nan"))]
    for batches in (padded, [make_batch(model, [one]) for one in prepared]):
        found_total, found = _gradients(model, batches, PUBLISHED)
        assert found_total == pytest.approx(total, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_without_anchors_has_no_rows_but_a_whole_graph(
    make_model: MakeModel, make_sample: MakeSample, make_batch: MakeBatch, shape: dict[str, object]
) -> None:
    model = make_model(**shape)
    none = model.preparation.prepare(make_sample("none", 6, [0] * 6), np.random.default_rng(0))
    total, gradients = _gradients(model, [make_batch(model, [none, none])], PUBLISHED)
    assert total == 0
    assert gradients.keys() == {name for name, part in model.named_parameters() if part.requires_grad}
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("with_markov", [True, False])
@pytest.mark.parametrize("where", ["through", "stop"])
def test_the_confidence_gradient_stops_where_it_should(
    make_model: MakeModel, make_sample: MakeSample, make_batch: MakeBatch, where: str, with_markov: bool
) -> None:
    model = make_model(head="gated", confidence_gradient=where, confidence_with_markov=with_markov)
    batch = make_batch(model, _prepared(model, make_sample))
    _, gradients = _gradients(model, [batch], {"confidence": PUBLISHED["confidence"]})
    reached = {name.split(".")[0] if "markov" not in name else name for name, part in gradients.items() if part.any()}
    features = {"backbone", *(["markov_head.markov_w1.weight"] if with_markov else [])}
    # Neither the vocabulary side of the correction nor its gate enter the confidence; its label is detached.
    assert reached == {"confidence_head"} | (features if where == "through" else set())


def test_stopping_changes_nothing_else(make_model: MakeModel, make_sample: MakeSample, make_batch: MakeBatch) -> None:
    found = {}
    for where in ("through", "stop"):
        model = make_model(head="rnn", confidence_gradient=where)
        batch = make_batch(model, _prepared(model, make_sample))
        found[where] = _gradients(model, [batch], PUBLISHED)
        without = _gradients(model, [batch], {"ce": PUBLISHED["ce"], "tv": PUBLISHED["tv"]})[1]
    assert found["stop"][0] == found["through"][0]
    for name, gradient in found["stop"][1].items():
        if name.startswith("confidence_head"):
            assert torch.equal(gradient, found["through"][1][name])
        else:
            torch.testing.assert_close(gradient, without[name], rtol=0, atol=1e-6 * gradient.abs().max().item())
    assert not torch.equal(found["stop"][1]["backbone.fc.weight"], found["through"][1]["backbone.fc.weight"])


def test_a_confidence_term_without_the_head_is_refused(
    make_model: MakeModel, make_sample: MakeSample, make_batch: MakeBatch
) -> None:
    model = make_model(confidence_head=False)
    with pytest.raises(ConfigError, match=r"(?s)terms\.confidence.*confidence_logits"):
        _gradients(model, [make_batch(model, _prepared(model, make_sample))], PUBLISHED)


def test_autocast_rounds_and_nothing_else(
    make_model: MakeModel, make_sample: MakeSample, make_batch: MakeBatch
) -> None:
    model = make_model(head="rnn")
    batch = make_batch(model, _prepared(model, make_sample))
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch)
        result = RowEngine(PUBLISHED, Decay(DecayOptions(gamma=4.0)))(rounded, model.heads())
    for found, expected in (
        (rounded.correction, exact.correction),
        (rounded.extras["confidence_logits"], exact.extras["confidence_logits"]),
    ):
        difference = (found - expected).abs()
        assert 0 < difference.mean() < 0.03
    result.total.backward()
    assert all(part.grad.isfinite().all() for part in model.parameters() if part.grad is not None)
