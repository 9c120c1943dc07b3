"""The recorded vectors of the published implementation: training exactly, decoding token for token."""

from __future__ import annotations

import pytest
import torch

from deepspec_core.config.schema import LossOptions, WeightingOptions
from deepspec_core.contracts.rows import Rows
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import RowResult, build_engine
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.testing.draft_checks import check_near
from deepspec_core.testing.recorded import FORWARD, Recordings, TrainingCase
from deepspec_dspark.model import DSparkModel

TRAINING = ("vanilla", "gated", "rnn", "confidence-plain")
DECODING = ("decode-dspark", "decode-dspark-rnn")


@pytest.fixture(params=TRAINING)
def case(request: pytest.FixtureRequest, recordings: Recordings, family: str) -> TrainingCase:
    found = recordings.training(f"{family}-dspark-{request.param}")
    assert isinstance(found.draft, DSparkModel)
    return found


@pytest.fixture
def rows(case: TrainingCase) -> Rows:
    return case.draft(case.batch())


@pytest.fixture(params=["plain", "eager"])
def result(request: pytest.FixtureRequest, case: TrainingCase, rows: Rows, registry: Registry) -> RowResult:
    """By autograd, and by the formulas that compiled kernels share."""
    settings = case.record["loss_config"]
    alphas = {"ce": "ce_loss_alpha", "tv": "l1_loss_alpha", "confidence": "confidence_head_alpha"}
    loss = LossOptions(
        terms={term: settings[alpha] for term, alpha in alphas.items()},
        weighting=WeightingOptions(type="decay", options=DecayOptions(gamma=settings["loss_decay_gamma"])),
        kernels=request.param,
    )
    return build_engine(loss, registry)(rows, case.draft.heads(), with_metrics=True)


def test_rows_match_the_recording(case: TrainingCase, rows: Rows) -> None:
    model, expected, counted = case.draft, case.expected, case.expected["eval_mask"]
    assert len(rows.hidden) == int(counted.sum())
    assert torch.equal(rows.target_ids, expected["target_ids"][counted])
    logits = model.logits(rows.hidden) + model.markov_head.markov_w2(rows.correction)
    check_near(logits, expected["draft_logits"][counted], FORWARD)
    check_near(rows.extras["confidence_logits"], expected["confidence_logits"][counted], FORWARD)
    target_logits = model.logits(rows.target_hidden)[rows.target_index]
    check_near(target_logits, expected["aligned_target_logits"][counted], FORWARD)


def test_loss_and_gradients_match_the_recording(case: TrainingCase, result: RowResult) -> None:
    case.check_loss(result.total / (result.denominator + 1e-6))


def test_metrics_match_the_recording(case: TrainingCase, result: RowResult) -> None:
    # What preparation counts is published as means over sequences, and as shares of what there could have been.
    counts, options = [one.counts for one in case.prepared()], case.draft.options
    shares = {
        "valid_anchors": ([one["anchor_candidates"] for one in counts], case.inputs["input_ids"].shape[1]),
        "sampled_anchors": ([one["anchors"] for one in counts], options.num_anchors),
        "block_supervised_tokens": ([one["counted_slots"] / one["anchors"] for one in counts], options.block_size),
    }
    also = {}
    for name, (values, possible) in shares.items():
        mean = sum(values) / len(values)
        also |= {f"{name}_abs": mean, f"{name}_ratio": mean / possible}
    case.check_metrics(result.metrics, also)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("name", DECODING)
def test_decoding_matches_the_recording(
    recordings: Recordings, family: str, name: str, threshold: float, batch_size: int
) -> None:
    case = recordings.decoding(f"{family}-{name}")
    assert case.record["by_confidence_threshold"].keys() == {"0.0", "0.4"}
    case.check(batch_size=batch_size, threshold=threshold)
