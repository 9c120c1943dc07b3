"""Blocks at drawn anchors: where they start, what their slots should predict, which slots count, and their rows.

A block is anchored at a token that is known, and predicts the tokens after it. Everything ragged becomes index tensors
on the host, so that networks need no host work: only live blocks and counted slots are listed. Knows token ids and loss
masks; not the network that fills the blocks.

Legend: T tokens of one sample, M samples, A anchors of one sample, K predictions of a block, N live blocks,
R counted slots (rows), P distinct target positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import Tensor

from deepspec_core.contracts.draft import DraftBatch, PreparedSample, Sample
from deepspec_core.contracts.rows import Rows
from deepspec_core.preparation.positions import distinct_positions

__all__ = ["AnchorPreparation", "anchor_candidates", "anchored_rows", "counted_slots", "drawn"]


def anchor_candidates(loss_mask_T: Tensor) -> Tensor:
    """Positions p with loss_mask[p] = loss_mask[p+1] = 1, increasing: where a block may be anchored."""
    return (loss_mask_T[:-1].bool() & loss_mask_T[1:].bool()).nonzero().flatten()


def drawn(possible_A: Tensor, most: int, rng: np.random.Generator) -> Tensor:
    """At most `most` of the entries, uniformly without replacement, in their order; all where they are fewer."""
    count = min(len(possible_A), most)
    chosen = np.sort(rng.choice(len(possible_A), size=count, replace=False)) if count else np.zeros(0, dtype=np.int64)
    return possible_A[torch.from_numpy(chosen)]


def counted_slots(anchors_A: Tensor, loss_mask_T: Tensor, num_predictions: int) -> Tensor:
    """[A, K] bool: prediction k counts while a+1+k < T and loss_mask is 1 on all of a+1..a+1+k."""
    labels_AK = anchors_A[:, None] + 1 + torch.arange(num_predictions)
    length = len(loss_mask_T)
    supervised_AK = loss_mask_T.bool()[labels_AK.clamp(max=length - 1)] & (labels_AK < length)
    return supervised_AK.long().cumprod(1).bool()


@frozen(kw_only=True)
class AnchorPreparation:
    """A contracts.draft.Preparation: draws at most `num_anchors` anchors a sample, uniformly without replacement.

    Prediction k = 0..num_predictions-1 of a block anchored at a is of token a+1+k, whichever slot makes it. No anchor
    is before position `first`: a draft that reads the features at a-1 says 1.
    """

    num_predictions: int = field(validator=gt(0))
    num_anchors: int = field(validator=gt(0))
    first: int = field(default=0, validator=ge(0))

    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        """Draw anchors in increasing order. Where fewer candidates exist than anchors, all of them are taken."""
        return self.at(sample, drawn(self._candidates(sample), self.num_anchors, rng))

    def _candidates(self, sample: Sample) -> Tensor:
        candidates_A = anchor_candidates(sample.loss_mask)
        return candidates_A[candidates_A >= self.first]

    def at(self, sample: Sample, anchors_A: Tensor) -> PreparedSample:
        """The sample with these anchors [A] int64, increasing, rather than drawn ones."""
        counted_AK = counted_slots(anchors_A, sample.loss_mask, self.num_predictions)
        labels_AK = (anchors_A[:, None] + 1 + torch.arange(self.num_predictions)).clamp(max=len(sample.input_ids) - 1)
        return PreparedSample(
            sample=sample,
            tensors={"anchors": anchors_A, "counted": counted_AK, "labels": sample.input_ids[labels_AK]},
            counts={
                "anchor_candidates": len(self._candidates(sample)),
                "anchors": len(anchors_A),
                "counted_slots": int(counted_AK.sum()),
                "samples_without_anchors": int(len(anchors_A) == 0),
            },
        )

    def collate(self, prepared: Sequence[PreparedSample]) -> dict[str, Tensor]:
        """The batch's live blocks and rows, as indices into tensors of the batch, packed or not.

        Blocks, sequence by sequence: `sequence` [N] is a block's row of the batch, `anchors` [N] its anchor's column.
        Rows: `block`, `slot` and `labels` [R]; `target_sequence` and `target_position` [P], the distinct places they
        are compared with, and `target_index` [R]. If samples are packed there is `begins` [N]: the column in which the
        block's conversation begins, and before which it sees nothing. An anchor's position in its conversation is
        anchors - begins.

        A batch without any anchor keeps one block, at position 0, that yields no row, so that every parameter stays in
        the graph.
        """
        anchors = [one.tensors["anchors"] for one in prepared]
        counted = [one.tensors["counted"] for one in prepared]
        labels = [one.tensors["labels"] for one in prepared]
        if not sum(map(len, anchors)):
            anchors[0] = torch.zeros(1, dtype=torch.long)
            counted[0] = torch.zeros(1, self.num_predictions, dtype=torch.bool)
            labels[0] = torch.zeros(1, self.num_predictions, dtype=torch.long)
        counted_NK = torch.cat(counted)
        sizes_M = torch.tensor([len(part) for part in anchors])
        rows_M = torch.tensor([index if one.row is None else one.row for index, one in enumerate(prepared)])
        begins_N = torch.tensor([one.start for one in prepared]).repeat_interleave(sizes_M)
        sequence_N, anchors_N = rows_M.repeat_interleave(sizes_M), torch.cat(anchors) + begins_N
        block_R, slot_R = counted_NK.nonzero(as_tuple=True)
        sequence_P, position_P, index_R = distinct_positions(sequence_N[block_R], anchors_N[block_R] + slot_R)
        return {
            "anchors": anchors_N,
            "sequence": sequence_N,
            "block": block_R,
            "slot": slot_R,
            "labels": torch.cat(labels)[block_R, slot_R],
            "target_sequence": sequence_P,
            "target_position": position_P,
            "target_index": index_R,
            **({} if prepared[0].row is None else {"begins": begins_N}),
        }


def anchored_rows(batch: DraftBatch, hidden_NKH: Tensor) -> Rows:
    """The counted slots of a batch that AnchorPreparation laid out, each with weight 1.

    `hidden_NKH` is what the draft made for every prediction of every live block. How slots of a block weigh is the
    run's weighting.
    """
    prepared = batch.prepared
    block_R, slot_R = prepared["block"], prepared["slot"]
    ones_R = torch.ones(len(block_R), dtype=torch.float32)
    weight_R = torch.ones_like(ones_R, device=block_R.device)
    return Rows(
        hidden=hidden_NKH[block_R, slot_R],
        target_hidden=batch.features.last_hidden[prepared["target_sequence"], prepared["target_position"]],
        target_index=prepared["target_index"],
        target_ids=prepared["labels"],
        weight=weight_R,
        slot=slot_R,
        block=block_R,
        on_host=(*batch.on_host, (weight_R, ones_R)),
    )
