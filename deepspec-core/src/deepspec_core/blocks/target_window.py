"""The target's logits that a chunk of rows is compared with: formed once a position, kept while chunks need them.

Knows the plan's windows and the target's head; not the rows, nor what they are compared for.

Legend: P distinct target positions, U rows of the window, N rows of the chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec_core.blocks.large_buffer import large_buffer
from deepspec_core.blocks.row_kernels import Logits, RowKernels, TargetRows
from deepspec_core.blocks.row_plan import Chunk


class TargetWindow:
    """`advance` to each chunk in turn. After it: `rows`, what the chunk's rows are compared with.

    `kernels` None: their lse_U is not kept.
    """

    def __init__(
        self,
        hidden_PH: Tensor,
        head_VH: Tensor,
        *,
        rows: int,
        softcap: float | None,
        kernels: RowKernels | None,
    ) -> None:
        self._hidden_PH, self._head_VH, self._softcap, self._kernels = hidden_PH, head_VH, softcap, kernels
        self._buffer = large_buffer(rows, head_VH.shape[0], dtype=hidden_PH.dtype, device=hidden_PH.device)
        none = torch.zeros(0, dtype=torch.int64, device=hidden_PH.device)
        lse_U = hidden_PH.new_empty(0, dtype=torch.promote_types(hidden_PH.dtype, torch.float32))
        self.rows = TargetRows(self._logits(0), lse_U, none)

    def advance(self, chunk: Chunk) -> None:
        """Keep what the chunk or a later one needs, form what is new."""
        assert chunk.kept_U is not None
        assert chunk.fresh_U is not None
        assert chunk.window_row_N is not None
        kept, size = len(chunk.kept_U), len(chunk.kept_U) + len(chunk.fresh_U)
        if kept:
            self._buffer[:kept] = self._buffer[chunk.kept_U]
        logits, lse_U = self._logits(size), self.rows.lse_U
        if self._kernels is not None:
            lse_U = lse_U[chunk.kept_U]
        if size > kept:
            torch.mm(self._hidden_PH[chunk.fresh_U], self._head_VH.mT, out=self._buffer[kept:size])
            if self._kernels is not None:
                lse_U = torch.cat((lse_U, self._kernels.normaliser(logits.rows(slice(kept, size)))))
        self.rows = TargetRows(logits, lse_U, chunk.window_row_N)

    def argmax(self) -> Tensor:
        """[U] int64."""
        assert self._kernels is not None
        return self._kernels.argmax(self.rows.logits)

    def _logits(self, size: int) -> Logits:
        return Logits(self._buffer[:size], None, self._softcap)
