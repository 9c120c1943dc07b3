"""What loss terms may read in the row engine, and what they are told where they read something else."""

from __future__ import annotations

import warnings

import pytest
import torch
from attrs import evolve
from row_definition import (
    WithoutCorrection,
    make,
    mixed,
)
from torch import Tensor

from deepspec_core.contracts.loss import RowStats
from deepspec_core.contracts.rows import Rows
from deepspec_core.errors import ConfigError
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.terms import (
    Confidence,
    CrossEntropy,
)
from deepspec_core.rows.weightings import Uniform


class ReadsLogits(WithoutCorrection):
    needs_logits = True

    def __call__(self, stats: RowStats) -> Tensor:
        return stats.draft_logits.logsumexp(-1)


class ReadsLogitsUnannounced(ReadsLogits):
    needs_logits = False


def test_terms_that_read_logits_get_them_or_an_error() -> None:
    rows, heads, leaves = make()
    result = RowEngine({"own": (ReadsLogits(), 1.0)}, Uniform(), 4)(rows, heads)
    expected = (rows.weight * (leaves["hidden"] @ heads.draft.T).logsumexp(-1)).sum()
    torch.testing.assert_close(result.total, expected.detach(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match="term own reads logits"):
        RowEngine({"own": (ReadsLogits(), 1.0)}, Uniform(), kernels="eager")(rows, heads)
    with pytest.raises(ConfigError, match="needs_logits = True"):
        RowEngine({"own": (ReadsLogitsUnannounced(), 1.0)}, Uniform(), kernels="eager")(rows, heads)


class ReadsAHead:
    needs_target = False
    needs_extras = ("survival_head",)

    def __call__(self, stats: RowStats) -> Tensor:
        return stats.extras["survival_head"] ** 2


def test_extras_may_have_any_name() -> None:
    """One that ends as the vocabulary's heads do is a row's number all the same."""
    rows, heads, leaves = make()
    rows = evolve(rows, extras={"survival_head": leaves["confidence"]})
    result = RowEngine({"own": (ReadsAHead(), 1.0)}, Uniform(), 4)(rows, heads)
    (gradient,) = torch.autograd.grad(result.total, leaves["confidence"])
    torch.testing.assert_close(gradient, 2.0 * rows.weight * leaves["confidence"].detach())


class WithoutCorrectionUnannounced(WithoutCorrection):
    needs_uncorrected = False


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_a_correction_is_added_to_is_there_for_those_who_say_so(kernels: str, softcap: float | None) -> None:
    rows, heads, _ = make(correction=True, softcap=softcap)
    with pytest.raises(ConfigError, match="needs_uncorrected = True"):
        RowEngine({"own": (WithoutCorrectionUnannounced(), 1.0)}, Uniform(), kernels=kernels)(rows, heads)
    rows, heads, _ = make(softcap=softcap)
    own, ce = (
        RowEngine({"own": (term, 1.0)}, Uniform(), kernels=kernels)(rows, heads).total
        for term in (WithoutCorrectionUnannounced(), CrossEntropy())
    )
    torch.testing.assert_close(own, ce, rtol=1e-6, atol=0)  # the same sums, in memory of their own


def test_a_term_that_reads_what_is_not_there() -> None:
    rows, heads, _ = make()
    fields = {"hidden", "target_ids", "weight", "slot", "block"}
    bare = Rows(**{name: getattr(rows, name) for name in fields})
    with pytest.raises(ConfigError, match="no target features"):
        RowEngine(mixed("tv"), Uniform())(bare, heads)
    with pytest.raises(ConfigError, match=r"(?s)terms\.confidence.*confidence_logits"):
        RowEngine({"confidence": (Confidence(), 1.0)}, Uniform())(
            Rows(**{name: getattr(rows, name) for name in (*fields, "target_hidden", "target_index")}), heads
        )


def test_an_extra_that_no_term_trains_is_said_once() -> None:
    rows, heads, _ = make()
    engine = RowEngine(mixed("two"), Uniform())
    with pytest.warns(RuntimeWarning, match="no loss term trains the draft's confidence_logits"):
        engine(rows, heads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(rows, heads)
        RowEngine(mixed("mix"), Uniform())(rows, heads)
