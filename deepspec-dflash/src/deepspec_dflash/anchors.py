"""The host half of training: where blocks start, what their slots should predict, and which slots count.

Knows token ids and loss masks; not the network. Everything ragged becomes index tensors here, so that the network needs
no host work: only live blocks and counted slots are listed.

Legend: T tokens of one sample, B sequences, A most blocks in one sequence, K predictions of a block, N live blocks,
R counted slots (rows), P distinct target positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor

from deepspec_core.contracts.draft import PreparedSample, Sample


def candidates(loss_mask_T: Tensor) -> Tensor:
    """Positions p with loss_mask[p] = loss_mask[p+1] = 1, increasing: where a block may be anchored."""
    return (loss_mask_T[:-1].bool() & loss_mask_T[1:].bool()).nonzero().flatten()


def counted_slots(anchors_A: Tensor, loss_mask_T: Tensor, num_predictions: int) -> Tensor:
    """[A, K] bool: prediction k counts while a+1+k < T and loss_mask is 1 on all of a+1..a+1+k."""
    labels_AK = anchors_A[:, None] + 1 + torch.arange(num_predictions)
    length = len(loss_mask_T)
    supervised_AK = loss_mask_T.bool()[labels_AK.clamp(max=length - 1)] & (labels_AK < length)
    return supervised_AK.long().cumprod(1).bool()


@frozen(kw_only=True)
class AnchorPreparation:
    """A contracts.draft.Preparation: draws at most `num_anchors` anchors a sample, uniformly without replacement.

    Prediction k = 0..num_predictions-1 of a block anchored at a is of token a+1+k, whichever slot makes it.
    """

    num_predictions: int = field(validator=gt(0))
    num_anchors: int = field(validator=gt(0))

    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        """Draw anchors in increasing order. Where fewer candidates exist than anchors, all of them are taken."""
        possible = candidates(sample.loss_mask)
        count = min(len(possible), self.num_anchors)
        chosen = np.sort(rng.choice(len(possible), size=count, replace=False)) if count else np.zeros(0, dtype=np.int64)
        return self.at(sample, possible[torch.from_numpy(chosen)])

    def at(self, sample: Sample, anchors_A: Tensor) -> PreparedSample:
        """The sample with these anchors [A] int64, increasing, rather than drawn ones."""
        counted_AK = counted_slots(anchors_A, sample.loss_mask, self.num_predictions)
        labels_AK = (anchors_A[:, None] + 1 + torch.arange(self.num_predictions)).clamp(max=len(sample.input_ids) - 1)
        return PreparedSample(
            sample=sample,
            tensors={"anchors": anchors_A, "counted": counted_AK, "labels": sample.input_ids[labels_AK]},
            counts={
                "anchor_candidates": len(candidates(sample.loss_mask)),
                "anchors": len(anchors_A),
                "counted_slots": int(counted_AK.sum()),
                "samples_without_anchors": int(len(anchors_A) == 0),
            },
        )

    def collate(self, prepared: Sequence[PreparedSample]) -> dict[str, Tensor]:
        """The batch's live blocks and rows, as indices.

        Blocks: `anchors` [N] and `sequence` [N], sequence by sequence; `grid` [B, A], which block is a sequence's j-th
        (0 where it has fewer) and `grid_anchors` [B, A], its anchor (0, that is no context, where it has fewer);
        `place` [N], where in the flattened grid a block is. Rows: `block`, `slot` and `labels` [R]; `target_sequence`
        and `target_position` [P], the distinct positions they are compared with, and `target_index` [R].

        A batch without any anchor keeps one block that yields no row, so that every parameter stays in the graph.
        """
        anchors = [one.tensors["anchors"] for one in prepared]
        counted = [one.tensors["counted"] for one in prepared]
        labels = [one.tensors["labels"] for one in prepared]
        if not sum(map(len, anchors)):
            anchors[0] = torch.zeros(1, dtype=torch.long)
            counted[0] = torch.zeros(1, self.num_predictions, dtype=torch.bool)
            labels[0] = torch.zeros(1, self.num_predictions, dtype=torch.long)
        anchors_N, counted_NK = torch.cat(anchors), torch.cat(counted)
        sizes_B = torch.tensor([len(part) for part in anchors])
        sequence_N = torch.arange(len(prepared)).repeat_interleave(sizes_B)
        first_B = sizes_B.cumsum(0) - sizes_B
        rank_N = torch.arange(len(anchors_N)) - first_B[sequence_N]
        width = int(sizes_B.max())
        place_N = sequence_N * width + rank_N
        grid_BA = torch.zeros(len(prepared) * width, dtype=torch.long)
        grid_BA[place_N] = torch.arange(len(anchors_N))
        grid_anchors_BA = torch.zeros_like(grid_BA)
        grid_anchors_BA[place_N] = anchors_N

        block_R, slot_R = counted_NK.nonzero(as_tuple=True)
        where_R2 = torch.stack([sequence_N[block_R], anchors_N[block_R] + slot_R], dim=1)
        where_P2, target_index_R = torch.unique(where_R2, dim=0, return_inverse=True)
        return {
            "anchors": anchors_N,
            "sequence": sequence_N,
            "grid": grid_BA.view(len(prepared), width),
            "grid_anchors": grid_anchors_BA.view(len(prepared), width),
            "place": place_N,
            "block": block_R,
            "slot": slot_R,
            "labels": torch.cat(labels)[block_R, slot_R],
            "target_sequence": where_P2[:, 0],
            "target_position": where_P2[:, 1],
            "target_index": target_index_R,
        }
