"""Training metrics from figures of rows. Each is a ratio of sums, kept as (numerator, denominator) to be added up.

Knows rows, slots and blocks. Does not know logits, losses or ranks.

Legend: N rows, M blocks, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec_core.contracts.rows import Rows
from deepspec_core.rows.host_side import host_side, sent

Ratio = tuple[Tensor, Tensor]


def slot_metrics(rows: Rows, *, correct_N: Tensor, acceptance_N: Tensor | None) -> dict[str, Ratio]:
    """`accuracy@k` and `tau_greedy`; with acceptance rates also `accept_rate@k` and `tau_probabilistic`.

    Rows with a weight above 0 are counted.

    accept_rate@k: The mean acceptance rate of the counted rows of slot k.
    accuracy@k: The same, of whether a row's label is the draft's argmax.
    tau_probabilistic: The mean over blocks whose slot 0 is counted of 1 + sum_k prod_{j<=k} acceptance_j. The
        acceptance rate of a slot that is not counted is 0 here.
    tau_greedy: The same, of whether a row's label is the draft's argmax.

    `rows` come from `weighted`, so nothing waits for the device.
    """
    if rows.slot.numel() == 0:
        return {}
    counted_N, host = rows.weight > 0, host_side(rows)
    num_slots = int(host["slot"].max()) + 1
    count_S = _per_slot(counted_N, rows.slot, num_slots)
    correct_S = _per_slot(correct_N & counted_N, rows.slot, num_slots)
    metrics = {f"accuracy@{k}": (correct_S[k], count_S[k]) for k in range(num_slots)}
    host_block_N = _numbered(rows)
    host_started_M = torch.zeros(int(host_block_N[-1]) + 1, dtype=torch.bool)
    host_started_M[host_block_N[(host["weight"] > 0) & (host["slot"] == 0)]] = True
    block_N, started_M = (sent(part, rows.slot.device) for part in (host_block_N, host_started_M))

    def expected_length(accepted_N: Tensor) -> Ratio:
        accepted_MS = accepted_N.new_zeros(len(started_M), num_slots)
        accepted_MS[block_N, rows.slot] = accepted_N
        length_M = 1.0 + accepted_MS.cumprod(dim=1).sum(dim=1)
        return (length_M * started_M).sum(), started_M.sum().to(length_M.dtype)

    metrics["tau_greedy"] = expected_length((correct_N & counted_N).to(torch.float32))
    if acceptance_N is None:
        return metrics
    kept_N = acceptance_N * counted_N
    accepted_S = _per_slot(kept_N, rows.slot, num_slots)
    metrics |= {f"accept_rate@{k}": (accepted_S[k], count_S[k]) for k in range(num_slots)}
    metrics["tau_probabilistic"] = expected_length(kept_N)
    return metrics


def survival_metrics(
    name: str, rows: Rows, *, survival_logits_N: Tensor, acceptance_N: Tensor, weight_N: Tensor
) -> dict[str, Ratio]:
    """How well the logits of confidence predict acceptance rates.

    A logit is that of a row's acceptance, given that all rows of its block before it are accepted. With p =
    sigmoid(logit) and c the acceptance rate, the metrics are weighted means of |p - c| (`NAME_abs_error`), of p - c
    (`NAME_bias`) and of prod_{j<=k} p_j - prod_{j<=k} c_j (`NAME_cumprod_bias`).
    """
    if rows.slot.numel() == 0:
        return {}
    survival_N = survival_logits_N.detach().to(acceptance_N.dtype).sigmoid()
    host_block_N = _numbered(rows)
    shape = int(host_block_N[-1]) + 1, int(host_side(rows)["slot"].max()) + 1
    block_N = sent(host_block_N, rows.slot.device)

    def cumulative(values_N: Tensor) -> Tensor:
        return values_N.new_ones(shape).index_put((block_N, rows.slot), values_N).cumprod(dim=1)[block_N, rows.slot]

    errors = {
        "abs_error": (survival_N - acceptance_N).abs(),
        "bias": survival_N - acceptance_N,
        "cumprod_bias": cumulative(survival_N) - cumulative(acceptance_N),
    }
    return {f"{name}_{error}": ((weight_N * value_N).sum(), weight_N.sum()) for error, value_N in errors.items()}


def _numbered(rows: Rows) -> Tensor:
    """The blocks of the rows, [N], numbered from 0 on without a gap, on the host."""
    numbered_N: Tensor = torch.unique_consecutive(host_side(rows)["block"], return_inverse=True)[1]
    return numbered_N


def _per_slot(values_N: Tensor, slot_N: Tensor, num_slots: int) -> Tensor:
    values_N = values_N if values_N.is_floating_point() else values_N.to(torch.float32)
    return values_N.new_zeros(num_slots).index_add_(0, slot_N, values_N)
