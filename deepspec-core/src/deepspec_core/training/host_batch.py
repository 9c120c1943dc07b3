"""A micro-batch on the host, padded, and how it becomes what a draft reads on the device.

Knows padding and feature sources; not what the algorithm's own tensors mean.

Legend: B samples, T tokens of the longest, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from deepspec_core.contracts.draft import DraftBatch, Preparation, PreparedSample, Sample
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.data.collate import pad, pad_features, pad_ids


@frozen(kw_only=True, eq=False)
class HostBatch:
    """input_ids, loss_mask, attention_mask [B, T]; padding is 0 and false.

    `features` [B, T, C] and [B, T, H], None where the samples came without; `samples` are the batch's, features
    taken off them; `prepared` is the algorithm's; `counts` are the preparation's, summed.
    """

    samples: tuple[Sample, ...]
    input_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor
    features: TargetFeatures | None
    prepared: Mapping[str, Tensor]
    counts: Mapping[str, int]

    def to_draft_batch(self, source: FeatureSource, device: torch.device) -> DraftBatch:
        """The batch on the device; features that are missing are asked of `source`."""
        input_ids = self.input_ids.to(device, non_blocking=True)
        attention_mask = self.attention_mask.to(device, non_blocking=True)
        features = self.features
        if features is None:
            features = source.features(self.samples, input_ids, attention_mask)
        batch = DraftBatch(
            input_ids=input_ids,
            loss_mask=self.loss_mask,
            attention_mask=attention_mask,
            features=features,
            prepared=self.prepared,
        )
        return batch.to(device)


def host_batch(prepared: Sequence[PreparedSample], preparation: Preparation) -> HostBatch:
    """Pad prepared samples on the right into one batch; all of them carry features or none does."""
    samples = [one.sample for one in prepared]
    counts: Counter[str] = Counter()
    for one in prepared:
        counts.update(one.counts)
    input_ids, attention_mask = pad_ids(samples)
    return HostBatch(
        samples=tuple(evolve(sample, features=None) for sample in samples),
        input_ids=input_ids,
        loss_mask=pad([sample.loss_mask for sample in samples]),
        attention_mask=attention_mask,
        features=pad_features(samples),
        prepared=preparation.collate(prepared),
        counts=dict(counts),
    )
