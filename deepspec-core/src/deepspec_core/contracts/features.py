"""Where target features come from: a cache on disk, or the target itself.

A source has samples, and gives the features of a batch of them. Training works the same with either.
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

    A source may have an attribute `of_given_texts`. If it is true, `features` are those of the `input_ids` it is given,
    whatever the samples say. Drafts that train on texts of their own need such a source.

    A source may also have `tokens_of(index)`, which gives a sample without reading its features. It is called for every
    sample before a draft with a reduced vocabulary is trained.

    A source of features that are not stored may have `packed_features(input_ids, attention_mask, position_ids,
    document_ids)`, for rows [B, T] that hold several conversations each, as in contracts.draft.DraftBatch. Without it,
    `features` is called with a row for each conversation, and core packs what it returns.

    A source that reads ahead by itself may have `in_order(indices)`, which gives the samples of these indices with
    their features, in this order. What it returns is iterated over in a thread of the training process, and has
    `close()`, which may be called from another thread and ends the iteration. Then no loader workers are started.

    A source may have `figures()`, a mapping of names to numbers for metrics.jsonl, which are summed over ranks, and
    `summary()`, a mapping for the summary of the train stage.
    """

    def __len__(self) -> int: ...

    def lengths(self) -> Sequence[int]:
        """The number of tokens of each sample, in order. The samples are not read for it."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample, with its features if they are stored. Called in loader workers."""
        ...

    def features(self, samples: Sequence[Sample], input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """The features of a right-padded batch [B, T], on the batch's device. Called in the training process."""
        ...
