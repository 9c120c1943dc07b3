"""Padding ragged samples on the right into one batch. Knows tensors; not what a batch is for.

Legend: B samples, T tokens of the longest, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures


def pad(ragged: Sequence[Tensor]) -> Tensor:
    """Tensors [t, ...] to [B, T, ...], zero (false) past each one's end. One alone is not copied."""
    if len(ragged) == 1:
        return ragged[0][None]
    return torch.nn.utils.rnn.pad_sequence(list(ragged), batch_first=True)


def pad_ids(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """input_ids [B, T] int64 and attention_mask [B, T] bool, true on real tokens."""
    input_ids_BT = pad([sample.input_ids for sample in samples])
    lengths_B = torch.tensor([len(sample.input_ids) for sample in samples])
    return input_ids_BT, torch.arange(input_ids_BT.shape[1]) < lengths_B[:, None]


def pad_features(samples: Sequence[Sample]) -> TargetFeatures | None:
    """Stored features [B, T, C] and [B, T, H], None where the samples have none."""
    features = [sample.features for sample in samples if sample.features is not None]
    assert len(features) in (0, len(samples)), "some samples of a batch have features, others have not"
    if not features:
        return None
    return TargetFeatures(
        hidden=pad([feature.hidden for feature in features]),
        last_hidden=pad([feature.last_hidden for feature in features]),
    )
