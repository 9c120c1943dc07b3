"""Online features of a target without weights, for targets that can run without numbers.

Knows the target's contract; no drafts, no files.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures, TargetModel
from deepspec_core.estimating.memory import without_torch_messages
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.targets.opening import first_line


class TriedFeatures(OnlineFeatures):
    """As training asks a target for them. `problem`: why its forward pass could not run, None where it could.

    A target that reads numbers on its way, or has an operation torch cannot do without them, does not run; its features
    then come from nowhere.
    """

    def __init__(self, samples: Sequence[Sample], skeleton: TargetModel, taps: Sequence[int]) -> None:
        super().__init__(samples, skeleton, taps)
        self._skeleton, self._num_taps = skeleton, len(taps)
        self.problem: str | None = None

    def features(self, samples: Sequence[Sample], input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """[B, T, taps * H] and [B, T, H]."""
        try:
            with without_torch_messages():
                return super().features(samples, input_ids, attention_mask)
        except RuntimeError as error:  # what torch raises depends on the operation
            self.problem = first_line(error)
        weight, size = self._skeleton.embedding_weight(), self._skeleton.architecture.hidden_size
        return TargetFeatures(
            hidden=weight.new_empty(*input_ids.shape, self._num_taps * size),
            last_hidden=weight.new_empty(*input_ids.shape, size),
        )
