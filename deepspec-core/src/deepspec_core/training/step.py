"""One micro-batch's forward pass: the draft, then the row engine. The one module that data parallelism wraps.

Knows a draft and an engine; not optimizers, ranks or how sums are divided.
"""

from __future__ import annotations

import torch
from torch import nn

from deepspec_core.contracts.draft import DraftBatch, DraftModel
from deepspec_core.contracts.rows import Rows
from deepspec_core.rows.engine import RowEngine, RowResult


class TrainingStep(nn.Module):
    """`step(batch)` -> RowResult. `compute_dtype` other than fp32 runs it under autocast; weights keep their own dtype.

    Autocast is entered here and not by the launcher's settings, so that what a run computes follows from its run file.
    """

    def __init__(self, draft: DraftModel, engine: RowEngine, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.draft = draft
        self.engine = engine
        self.compute_dtype = compute_dtype

    def forward(self, batch: DraftBatch, *, step: int = 0, with_metrics: bool = False) -> RowResult:
        """The batch's unnormalised loss at the optimizer's step `step`, its denominator and its metrics."""
        device = batch.input_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            rows: Rows = self.draft(batch)
            result: RowResult = self.engine(rows, self.draft.heads(), step=step, with_metrics=with_metrics)
        return result
