"""The target's logits that a chunk of rows is compared with: formed once a position, kept while chunks need them.

Knows the plan's windows and the target's head; not the rows, nor what they are compared for.

Legend: P distinct target positions, U rows of the window, N rows of the chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec_core.blocks.row_kernels import Logits, RowKernels
from deepspec_core.blocks.row_plan import Chunk


class TargetWindow:
    """`advance` to each chunk in turn. After it: `logits` [U, V], `row_N` [N] the row of each of the chunk's rows.

    `kernels` None: `lse_U` is not kept.
    """

    row_N: Tensor

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
        self._buffer = hidden_PH.new_empty(rows, head_VH.shape[0])
        self.logits = self._logits(0)
        self.lse_U = hidden_PH.new_empty(0, dtype=torch.promote_types(hidden_PH.dtype, torch.float32))

    def advance(self, chunk: Chunk) -> None:
        """Keep what the chunk or a later one needs, form what is new."""
        assert chunk.kept_U is not None
        assert chunk.fresh_U is not None
        assert chunk.window_row_N is not None
        kept, size = len(chunk.kept_U), len(chunk.kept_U) + len(chunk.fresh_U)
        if kept:
            self._buffer[:kept] = self._buffer[chunk.kept_U]
        self.logits = self._logits(size)
        self.row_N = chunk.window_row_N
        if self._kernels is not None:
            self.lse_U = self.lse_U[chunk.kept_U]
        if size == kept:
            return
        torch.mm(self._hidden_PH[chunk.fresh_U], self._head_VH.mT, out=self._buffer[kept:size])
        if self._kernels is not None:
            fresh_lse_U = self._kernels.normaliser(self.logits.rows(slice(kept, size)))
            self.lse_U = torch.cat((self.lse_U, fresh_lse_U))

    def argmax(self) -> Tensor:
        """[U] int64."""
        assert self._kernels is not None
        return self._kernels.argmax(self.logits)

    def _logits(self, size: int) -> Logits:
        return Logits(self._buffer[:size], None, self._softcap)
