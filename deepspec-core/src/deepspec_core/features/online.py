"""Features computed by the target during training. Knows the target's contract; stores nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepspec_core.config.schema import PACKED
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures, TargetModel
from deepspec_core.features.samples_by_id import SamplesById
from deepspec_core.training.packed_check import check_target_apart


class OnlineFeatures(SamplesById):
    """Samples ordered by id, the same order as with a cache; features on demand, in the target's dtype.

    Loader workers get the samples without the target.
    """

    of_given_texts = True

    def __init__(self, samples: Sequence[Sample], target: TargetModel, taps: Sequence[int]) -> None:
        super().__init__(samples)
        self._target: TargetModel | None = target
        self._taps = tuple(taps)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_target": None}

    def features(self, samples: Sequence[Sample], input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """One forward of the target over the batch. Positions past a sequence's end are set to 0."""
        return self._features(input_ids, attention_mask, None, None)

    def packed_features(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, document_ids: Tensor
    ) -> TargetFeatures:
        """The same of packed rows: the target sees each conversation alone."""
        return self._features(input_ids, attention_mask, position_ids, document_ids)

    def _features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
    ) -> TargetFeatures:
        assert self._target is not None, "features are computed in the training process"
        with torch.no_grad():
            features = self._target.features(input_ids, attention_mask, position_ids, document_ids, self._taps)
        padding_BT1 = ~attention_mask[..., None].bool()
        return TargetFeatures(
            hidden=features.hidden.masked_fill(padding_BT1, 0),
            last_hidden=features.last_hidden.masked_fill(padding_BT1, 0),
        )


def from_run(run: Any) -> OnlineFeatures:
    """`[features] mode = "online"`."""
    if run.file.train.batching == PACKED:
        check_target_apart(run.target.model, run.file.target.layers)
    return OnlineFeatures(run.data.training_samples(), run.target.model, run.file.target.layers)
