"""Where target features come from: a cache on disk, or the target itself.

A source yields samples and, per batch, fills in their features; training cannot tell the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures

__all__ = ["FeatureSource"]


@runtime_checkable
class FeatureSource(Protocol):
    """A map-style set of samples, in a fixed order, and their features."""

    def __len__(self) -> int: ...

    def lengths(self) -> Sequence[int]:
        """Tokens of each sample, in order, without reading the samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample; with features where they are stored. Called in loader workers."""
        ...

    def features(self, samples: Sequence[Sample], input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """The features of a right-padded batch [B, T], on the batch's device. Called in the training process."""
        ...
