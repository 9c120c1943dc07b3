"""Rows: what drafts hand to losses. They are the supervised positions of a batch, before the vocabulary projection.

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
    """The supervised predictions of a batch, one a row. The rows of a block are contiguous and in the order of slots.

    Slots are from 0 on, and each is once in its block. A batch without supervised positions has N = 0. Its tensors are
    then empty and keep their other dimensions. Core checks all this in every step (rows/rows_check.py).

    on_host: Pairs of a tensor and its copy in the host's memory. Core needs slot, block, weight, target_index,
        target_ids and denominator there. It looks for each among the pairs, and reads it back if it is in none, for
        which the host waits in every micro-batch. A draft hands on DraftBatch.on_host, and adds what it made itself.
    """

    hidden: Tensor  # [N, H] input of the draft's lm_head
    correction: Tensor | None = (
        None  # [N, r] low-rank logit correction, projected by Heads.correction, added after the cap
    )
    target_hidden: Tensor | None = None  # [P, H] input of the target's lm_head, each position once
    target_index: Tensor | None = None  # [N] int64, the one of the P positions that a row is compared with
    target_ids: Tensor | None = None  # [N] int64, labels; None: the target's argmax, for rows with `target_hidden`
    weight: Tensor  # [N] fp32, multiplied with the run's weighting; 0: the row is not there
    slot: Tensor  # [N] int64, position in block, or test-time-training step
    block: Tensor  # [N] int64, which proposal the row belongs to, non-decreasing; chunks never split a block
    extras: Mapping[str, Tensor] = field(factory=dict)  # e.g. {"confidence_logits": [N]}
    denominator: Tensor | None = (
        None  # [] what the batch's sums are divided by, above 0 with rows; None: the weights' sum
    )
    on_host: tuple[tuple[Tensor, Tensor], ...] = ()


@frozen(kw_only=True, eq=False)
class Heads:
    """The vocabulary projections that turn rows into logits.

    draft [D, H] and target [V, H] may be the same frozen tensor. correction [D, r] is given if rows carry a correction.
    With a `softcap` c, the draft's logits become c * tanh(logits / c), before the correction is added. The target's
    do so by `target_softcap`; left out: the same.

    draft may be [G, D, H], and correction [G, D, r]: a head for each slot. A row is multiplied with that of its slot.

    draft_ids [D] int64, increasing, are the tokens that the draft's logits stand for; None: all V, in order. The draft
    gives every other token the probability 0. A row whose label is another token counts in no loss; metrics count it.
    """

    draft: Tensor
    target: Tensor
    correction: Tensor | None = None
    softcap: float | None = None
    draft_ids: Tensor | None = None
    target_softcap: float | None = Factory(lambda self: self.softcap, takes_self=True)
