"""Rows: what drafts hand to losses. The supervised positions of a batch, compacted, before the vocabulary projection.

Knows tensors only; not who made them nor what will be computed from them.

Legend: N rows, P distinct target positions, H hidden size, V vocabulary, r rank of the correction.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen
from torch import Tensor

__all__ = ["Heads", "Rows"]


@frozen(kw_only=True, eq=False)
class Rows:
    """One row is one supervised prediction. Rows of one block are contiguous and in slot order.

    A batch with nothing to supervise has N = 0; all tensors are then empty but keep their other dimensions.
    """

    hidden: Tensor  # [N, H] input of the draft's lm_head
    correction: Tensor | None = (
        None  # [N, r] low-rank logit correction, projected by Heads.correction, added after the cap
    )
    target_hidden: Tensor | None = None  # [P, H] input of the target's lm_head, each position once
    target_index: Tensor | None = None  # [N] int64, which of the P positions a row is compared with
    target_ids: Tensor | None = None  # [N] int64, labels; None = the target's own argmax, of rows with `target_hidden`
    weight: Tensor  # [N] fp32, times the run's weighting; 0 = a padding row
    slot: Tensor  # [N] int64, position in block, or test-time-training step
    block: Tensor  # [N] int64, which proposal the row belongs to, non-decreasing; chunks never split a block
    extras: Mapping[str, Tensor] = field(factory=dict)  # e.g. {"confidence_logits": [N]}
    denominator: Tensor | None = None  # [] what the batch's sums are divided by; None = its summed weights


@frozen(kw_only=True, eq=False)
class Heads:
    """The vocabulary projections rows are sent through.

    draft [V, H] and target [V, H] may be one tensor (frozen, shared). correction [V, r] where rows carry one.
    `softcap` c: logits become c * tanh(logits / c), draft and target alike, before the correction is added.
    """

    draft: Tensor
    target: Tensor
    correction: Tensor | None = None
    softcap: float | None = None
