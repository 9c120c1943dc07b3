"""The contract of feature sources: a cache on disk, the target in this process, or servers.

A source holds samples and returns the features of a batch of them. Training is the same with every source.
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
    """Samples in a fixed order, read by index, and their features.

    These attributes are optional:

    of_given_texts: True if `features` computes the features of the `input_ids` that it is given, even if the samples
        have other tokens. Drafts that train on texts of their own need such a source.
    tokens_of(index): Returns a sample without reading its features. Core calls it for every sample before it trains a
        draft with a reduced vocabulary.
    packed_features(input_ids, attention_mask, position_ids, document_ids): For sources that do not store features:
        returns the features of rows [B, T] that hold several conversations each, as in contracts.draft.DraftBatch.
        Without it, core calls `features` with one row for each conversation and packs the result.
    in_order(indices): For sources that read ahead by themselves: an iterator over the samples of these indices with
        their features, in this order. Core iterates in a thread of the training process and starts no loader workers.
        The iterator has `close()`, which ends the iteration and may be called from another thread.
    figures(): A mapping of names to numbers for metrics.jsonl. Core sums them over ranks.
    summary(): A mapping for the summary of the train stage.
    """

    def __len__(self) -> int: ...

    def lengths(self) -> Sequence[int]:
        """The number of tokens of each sample, in order, without reading the samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample, with its features if they are stored. Called in loader workers."""
        ...

    def features(self, samples: Sequence[Sample], input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """The features of a right-padded batch [B, T], on the batch's device. Called in the training process."""
        ...
