"""A row of weight 0 is not there, whatever its tensors hold and whichever kernels run."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from row_definition import WEIGHTINGS, N, make, mixed
from torch import Tensor

from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.kernels.formulas import why_not_compiled

NAN = float("nan")


def spoilt(rows: Rows) -> Rows:
    """The same rows, with NaN wherever only rows of weight 0 read. They get a target position of their own."""
    nothing_N = rows.weight == 0
    assert nothing_N.any()
    assert rows.correction is not None
    assert rows.target_hidden is not None
    assert rows.target_index is not None
    of_rows = nothing_N[:, None]
    return evolve(
        rows,
        hidden=torch.where(of_rows, NAN, rows.hidden),
        correction=torch.where(of_rows, NAN, rows.correction),
        target_hidden=torch.cat((rows.target_hidden, torch.full_like(rows.target_hidden[:1], NAN))),
        target_index=torch.where(nothing_N, len(rows.target_hidden), rows.target_index),
        extras={"confidence_logits": torch.where(nothing_N, NAN, rows.extras["confidence_logits"])},
    )


def outcome(engine: RowEngine, rows: Rows, heads: Heads, leaves: dict[str, Tensor]) -> list[Tensor]:
    """The total, its gradients, and all metrics."""
    result = engine(rows, heads, with_metrics=True)
    figures = [part for _, pair in sorted(result.metrics.items()) for part in pair]
    return [result.total, *torch.autograd.grad(result.total, list(leaves.values())), *figures]


@pytest.mark.parametrize("kernels", ["plain", "eager", "compiled"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("chunk_rows", [4, None])
def test_what_rows_of_weight_0_hold_reaches_nothing(chunk_rows: int | None, weighting: str, kernels: str) -> None:
    if kernels == "compiled" and (reason := why_not_compiled()):
        pytest.skip(reason)
    rows, heads, leaves = make(correction=True, softcap=2.0, train_head=True)
    engine = RowEngine(mixed("all"), WEIGHTINGS[weighting], chunk_rows, kernels=kernels)
    before, after = (outcome(engine, each, heads, leaves) for each in (rows, spoilt(rows)))
    assert all(one.isfinite().all() for one in after)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_they_are_as_good_as_left_out(weighting: str, kernels: str) -> None:
    rows, heads, _ = make(correction=True)
    assert rows.target_index is not None
    assert rows.target_ids is not None
    assert rows.correction is not None
    there = rows.weight != 0
    without = evolve(
        rows, hidden=rows.hidden[there], correction=rows.correction[there], target_index=rows.target_index[there],
        target_ids=rows.target_ids[there], weight=rows.weight[there], slot=rows.slot[there], block=rows.block[there],
        extras={name: extra[there] for name, extra in rows.extras.items()},
    )  # fmt: skip
    engine = RowEngine(mixed("all"), WEIGHTINGS[weighting], kernels=kernels)
    assert len(without.slot) < N
    found, expected = (engine(each, heads, with_metrics=True) for each in (rows, without))
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(dict(found.metrics), dict(expected.metrics))
