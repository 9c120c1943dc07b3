"""A padded micro-batch on the host, and how it becomes a draft's batch on the device.

Knows padding and feature sources. Does not know what the algorithm's own tensors mean.

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
    """A right-padded micro-batch. input_ids, loss_mask and attention_mask are [B, T]; padding is 0 and false.

    features: [B, T, C] and [B, T, H]; None if the samples came without features.
    samples: The samples of the batch, without their features.
    prepared: The algorithm's own tensors.
    counts: The sums of what the preparation counted.
    """

    samples: tuple[Sample, ...]
    input_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor
    features: TargetFeatures | None
    prepared: Mapping[str, Tensor]
    counts: Mapping[str, int]

    def to_draft_batch(self, source: FeatureSource, device: torch.device) -> DraftBatch:
        """The batch on the device. `source` gives features that are missing."""
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
    """Pad prepared samples on the right into one batch. Either all of them carry features or none does."""
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
