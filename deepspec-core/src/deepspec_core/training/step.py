"""The forward pass of one micro-batch: the draft, then the row engine. Data parallelism wraps this module.

Knows a draft and an engine. Does not know optimizers, ranks, or how sums are divided.
"""

from __future__ import annotations

import torch
from torch import nn

from deepspec_core.contracts.draft import DraftBatch, DraftModel
from deepspec_core.contracts.rows import Rows
from deepspec_core.errors import PluginError
from deepspec_core.layers.product_weights import ProductWeights
from deepspec_core.layers.recomputing import around_layers
from deepspec_core.plugins.origin import component_of, package_of
from deepspec_core.rows.engine import RowEngine, RowResult
from deepspec_core.rows.rows_check import RowsError
from deepspec_core.training.constant_buffers import ConstantBuffers


class TrainingStep(nn.Module):
    """`step(batch)` gives a RowResult. With a `compute_dtype` of bfloat16 it runs under autocast; weights keep their
    dtype. Linear layers read copies of them, see layers/product_weights.py.

    Autocast is entered here, not by the launcher's settings, so that a run's results follow from its run file.

    alone: Nothing but `backward` of this module's results makes gradients of the draft, in this process or another:
        gradients are then added to `parameter.grad` without autograd's knowledge. Not under data parallelism.
    checks: Whether the first pass is to show that the draft trains something and leaves its buffers as they are.
    """

    def __init__(
        self,
        draft: DraftModel,
        engine: RowEngine,
        *,
        compute_dtype: torch.dtype = torch.float32,
        alone: bool = False,
        checks: bool = False,
    ) -> None:
        super().__init__()
        self.draft = draft
        self.engine = engine
        self.compute_dtype = compute_dtype
        self.weights = ProductWeights(draft, compute_dtype, alone=alone)
        self._before_first = ConstantBuffers(draft) if checks else None

    def forward(self, batch: DraftBatch, *, step: int = 0, with_metrics: bool = False) -> RowResult:
        """The batch's loss at optimizer step `step` as a sum, its denominator and its metrics.

        Raises PluginError, with the draft's package, if its rows break the contract or depend on nothing that is
        trained, or if the first pass changes its buffers.
        """
        device = batch.input_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            with around_layers(self.weights.in_place):
                rows: Rows = self.draft(batch)
            heads = self.draft.heads()
            try:
                result: RowResult = self.engine(rows, heads, step=step, with_metrics=with_metrics, weights=self.weights)
            except RowsError as error:
                raise error.of(self.draft) from error
        if self._before_first is not None:
            self._before_first.check()
            self._before_first = None  # reading buffers in every pass would wait for the device
            if not result.total.requires_grad:
                raise PluginError(
                    "the draft's rows depend on nothing that is trained",
                    where=f"{package_of(self.draft)}, {component_of(self.draft)}",
                    found="rows without a gradient",
                    expected="`hidden` or other members of Rows, computed from the draft's weights and not detached",
                )
        return result
