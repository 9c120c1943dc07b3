"""Rows do not depend on padding or on how batches are cut; confidence trains what it is told to, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepspec_core.contracts.draft import DraftBatch
from deepspec_core.contracts.loss import LossTerm
from deepspec_core.errors import ConfigError
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.terms import Confidence, CrossEntropy, TotalVariation
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.rows.weightings import Decay
from deepspec_core.testing.draft_checks import check_near, gradients_of, trained
from deepspec_core.testing.random_batches import padded_batch, prepare, ragged_samples
from deepspec_dspark.model import DSparkModel

MakeModel = Callable[..., DSparkModel]
PUBLISHED = {"ce": (CrossEntropy(), 0.1), "tv": (TotalVariation(), 0.9), "confidence": (Confidence(), 1.0)}
SHAPES = [{"head": "vanilla"}, {"head": "gated"}, {"head": "rnn"}, {"rank": 0, "confidence_with_markov": False}]


def _batch(model: DSparkModel) -> DraftBatch:
    return padded_batch(model, prepare(model, ragged_samples()))


def _gradients(
    model: DSparkModel, batches: list[DraftBatch], terms: dict[str, tuple[LossTerm, float]]
) -> tuple[float, dict[str, Tensor]]:
    """The unnormalised loss over these batches and every parameter's gradient."""
    engine = RowEngine(terms, Decay(DecayOptions(gamma=4.0)))
    total = torch.stack([engine(model(batch), model.heads()).total for batch in batches]).sum()
    return total.item(), gradients_of(total, model)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_without_anchors_has_no_rows_but_a_whole_graph(make_model: MakeModel, shape: dict[str, object]) -> None:
    model = make_model(**shape)
    none = prepare(model, ragged_samples()[3:])
    total, gradients = _gradients(model, [padded_batch(model, none * 2)], PUBLISHED)
    assert total == 0
    assert gradients.keys() == trained(model).keys()
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("with_markov", [True, False])
@pytest.mark.parametrize("where", ["through", "stop"])
def test_the_confidence_gradient_stops_where_it_should(make_model: MakeModel, where: str, with_markov: bool) -> None:
    model = make_model(head="gated", confidence_gradient=where, confidence_with_markov=with_markov)
    batch = _batch(model)
    _, gradients = _gradients(model, [batch], {"confidence": PUBLISHED["confidence"]})
    reached = {name.split(".")[0] if "markov" not in name else name for name, part in gradients.items() if part.any()}
    features = {"backbone", *(["markov_head.markov_w1.weight"] if with_markov else [])}
    # Neither the vocabulary side of the correction nor its gate enter the confidence; its label is detached.
    assert reached == {"confidence_head"} | (features if where == "through" else set())


def test_stopping_changes_nothing_else(make_model: MakeModel) -> None:
    found = {}
    for where in ("through", "stop"):
        model = make_model(head="rnn", confidence_gradient=where)
        batch = _batch(model)
        found[where] = _gradients(model, [batch], PUBLISHED)
        without = _gradients(model, [batch], {"ce": PUBLISHED["ce"], "tv": PUBLISHED["tv"]})[1]
    # Two models: the same numbers, in memory of their own.
    assert found["stop"][0] == pytest.approx(found["through"][0], rel=1e-6)
    for name, gradient in found["stop"][1].items():
        if name.startswith("confidence_head"):
            check_near(gradient, found["through"][1][name], 1e-6, name)
        else:
            torch.testing.assert_close(gradient, without[name], rtol=0, atol=1e-6 * gradient.abs().max().item())
    one, other = (found[where][1]["backbone.fc.weight"] for where in ("stop", "through"))
    assert (one - other).abs().max() > 1e-4 * other.abs().max()


def test_a_confidence_term_without_the_head_is_refused(make_model: MakeModel) -> None:
    model = make_model(confidence_head=False)
    with pytest.raises(ConfigError, match=r"(?s)terms\.confidence.*confidence_logits"):
        _gradients(model, [_batch(model)], PUBLISHED)


def test_autocast_rounds_and_nothing_else(make_model: MakeModel) -> None:
    model = make_model(head="rnn")
    batch = _batch(model)
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
