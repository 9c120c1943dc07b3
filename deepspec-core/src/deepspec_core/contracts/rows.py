"""Rows: the supervised predictions of a batch, before the vocabulary projection. Drafts make them, losses read them.

This file knows tensors. It does not know which algorithm made them or which loss reads them.

Legend: N rows, P distinct target positions, H hidden size, V the target's vocabulary, D the draft's (V if it is not
reduced), G slots, r rank of the correction.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import Factory, field, frozen
from torch import Tensor

__all__ = ["Heads", "Rows"]


@frozen(kw_only=True, eq=False)
class Rows:
    """The supervised predictions of a batch, one per row. The rows of a block are contiguous and ordered by slot.

    Slots are counted from 0, and a block has each slot at most once. A batch without supervised positions has N = 0;
    its tensors are then empty and keep their other dimensions. Core checks all this in every step (rows/rows_check.py).

    on_host: Pairs of a tensor and its copy in the host's memory. Core needs slot, block, weight, target_index,
        target_ids and denominator on the host. It looks for each in the pairs; a tensor that is in none is copied from
        the device, and the host waits for this in every micro-batch. A draft passes on DraftBatch.on_host and adds
        pairs for tensors that it made itself.
    """

    hidden: Tensor  # [N, H] input of the draft's lm_head
    correction: Tensor | None = (
        None  # [N, r] low-rank logit correction, projected by Heads.correction, added after the cap
    )
    target_hidden: Tensor | None = None  # [P, H] input of the target's lm_head, each position once
    target_index: Tensor | None = None  # [N] int64, the index in target_hidden that a row is compared with
    target_ids: Tensor | None = None  # [N] int64, labels; None: the target's argmax, for rows with `target_hidden`
    weight: Tensor  # [N] fp32, multiplied by the run's weighting; rows of weight 0 are ignored
    slot: Tensor  # [N] int64, position in block, or test-time-training step
    block: Tensor  # [N] int64, the number of the row's block, non-decreasing; chunks never split a block
    extras: Mapping[str, Tensor] = field(factory=dict)  # e.g. {"confidence_logits": [N]}
    denominator: Tensor | None = (
        None  # [] divides the batch's sums; above 0 if there are rows; None: the sum of the weights
    )
    on_host: tuple[tuple[Tensor, Tensor], ...] = ()


@frozen(kw_only=True, eq=False)
class Heads:
    """The vocabulary projections that turn rows into logits.

    draft [D, H] and target [V, H] may be the same frozen tensor. correction [D, r] is given if rows carry a correction.
    With a `softcap` c, the draft's logits become c * tanh(logits / c) before the correction is added. `target_softcap`
    does the same for the target's logits; left out, it is `softcap`.

    draft may be [G, D, H], and correction [G, D, r]: one head for each slot. Each row is projected by its slot's head.

    draft_ids [D] int64, increasing, are the tokens of the draft's logits; None: all V, in order. The draft gives every
    other token the probability 0. A row whose label is not among them counts in no loss, but metrics count it.
    """

    draft: Tensor
    target: Tensor
    correction: Tensor | None = None
    softcap: float | None = None
    draft_ids: Tensor | None = None
    target_softcap: float | None = Factory(lambda self: self.softcap, takes_self=True)
