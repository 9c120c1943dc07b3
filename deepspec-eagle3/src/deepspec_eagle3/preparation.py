"""The host half of training: which index predicts what at which step, and which of these predictions count.

Step s of index q has seen the tokens up to q + 1 + s, and predicts the target's distribution at that position, that is
the token at q + 2 + s. Its anchor is the token at q + 1. Knows loss masks, lengths and random positions; not the
network.

Legend: T tokens of one sample, S steps, M documents of a batch, R counted predictions (rows), P distinct positions they
are compared with, N indices that predict something after step 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor
from torch.nn import functional as F

from deepspec_core.contracts.draft import PreparedSample, Sample
from deepspec_core.preparation.anchors import drawn
from deepspec_core.preparation.positions import distinct_positions
from deepspec_eagle3.options import Count, Normaliser


def counted_steps(loss_mask_T: Tensor, num_steps: int, count: Count = "published") -> Tensor:
    """[T, S] bool: which steps of which indices count, none past the end.

    "published": m_s[q] = m_0[q + s], where m_0 is the loss mask with the last token cleared. "labels": the tokens from
    q + 1 to q + 2 + s are all supervised.
    """
    if count == "labels":
        # supervised[q, k]: the token at q + 1 + k.
        supervised = torch.cat([loss_mask_T[1:].bool(), torch.zeros(num_steps + 1, dtype=torch.bool)])
        return supervised.unfold(0, num_steps + 1, 1).cumprod(dim=1).bool()[:, 1:]
    padded = torch.cat([loss_mask_T[:-1].bool(), torch.zeros(num_steps, dtype=torch.bool)])
    return padded.unfold(0, num_steps, 1)


@frozen(kw_only=True)
class StepPreparation:
    """A contracts.draft.Preparation."""

    num_steps: int = field(validator=gt(0))
    step_decay: float
    normaliser: Normaliser
    count: Count = "published"
    num_anchors: int | None = None

    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        """List the predictions that count, index by index and then by step; of `num_anchors` indices at most.

        Where indices are drawn, `weigh` is how many indices each stands for.
        """
        counted_TS = counted_steps(sample.loss_mask, self.num_steps, self.count)
        possible = counted_TS.any(dim=1).nonzero()[:, 0]
        weigh = 1.0
        if self.num_anchors is not None and len(possible) > self.num_anchors:
            kept_T = torch.zeros(len(counted_TS), dtype=torch.bool)
            kept_T[drawn(possible, self.num_anchors, rng)] = True
            counted_TS, weigh = counted_TS & kept_T[:, None], len(possible) / self.num_anchors
        index_R, step_R = counted_TS.nonzero(as_tuple=True)
        return PreparedSample(
            sample=sample,
            tensors={
                "index": index_R,
                "step": step_R,
                "length": torch.tensor(sample.original_length),
                "weigh": torch.tensor(weigh, dtype=torch.float64),
            },
            counts={"supervised_predictions": len(index_R), "samples_without_predictions": int(len(index_R) == 0)},
        )

    def collate(self, prepared: Sequence[PreparedSample]) -> dict[str, Tensor]:
        """The batch's rows as indices into documents, one document a sample in the order of `prepared`.

        `lengths` [M] before sequences were cut. Rows: `document`, `index`, `step`, `weight` and `block` [R], a block
        being one index over its steps, that is one proposal. `target_document` and `target_position` [P] are the
        distinct positions rows are compared with, `target_index` [R] which of them. `later_document` and `later_index`
        [N] are the indices later steps have to run over, `later` [R] which of them a row of such a step is (0 at
        step 0).
        """
        lengths_M = torch.stack([one.tensors["length"] for one in prepared])
        sizes_M = torch.tensor([len(one.tensors["index"]) for one in prepared])
        document_R = torch.arange(len(prepared)).repeat_interleave(sizes_M)
        index_R = torch.cat([one.tensors["index"] for one in prepared])
        step_R = torch.cat([one.tensors["step"] for one in prepared])
        _, block_R = torch.unique_consecutive(torch.stack([document_R, index_R]), dim=1, return_inverse=True)
        document_P, position_P, target_index_R = distinct_positions(document_R, index_R + step_R + 1)
        later_R = step_R > 0
        _, rank = torch.unique_consecutive(block_R[later_R], return_inverse=True)
        first = F.pad(rank[1:] != rank[:-1], (1, 0), value=True)[: len(rank)]
        weight_R = torch.tensor(self.step_decay, dtype=torch.float64) ** step_R
        weight_R = weight_R * torch.stack([one.tensors["weigh"] for one in prepared])[document_R]
        if self.normaliser == "sequence":
            weight_R = weight_R / lengths_M[document_R]
        return {
            "lengths": lengths_M,
            "document": document_R,
            "index": index_R,
            "step": step_R,
            "weight": weight_R.to(torch.float32),
            "block": block_R,
            "later": torch.zeros_like(step_R).masked_scatter(later_R, rank),
            "later_document": document_R[later_R][first],
            "later_index": index_R[later_R][first],
            "target_document": document_P,
            "target_position": position_P,
            "target_index": target_index_R,
        }
