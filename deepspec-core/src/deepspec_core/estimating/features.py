"""Online features of a target without weights, for targets that can run on tensors without values.

Knows the target's contract; knows no drafts and no files.
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
    """A feature source that runs the target as online training does. `problem` says why the target's forward pass could
    not run; None if it could.

    A target cannot run if its forward pass reads values, or has an operation that torch supports only with values. The
    features are then empty tensors of the right shape.
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
