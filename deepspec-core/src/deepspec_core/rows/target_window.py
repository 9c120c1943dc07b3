"""The target's logits that a chunk of rows is compared with: formed once a position, kept while chunks need them.

Knows the plan's windows and the target's head; not the rows, nor what they are compared for.

Legend: P distinct target positions, U rows of the window, N rows of the chunk, X rows of a product, V vocabulary, H
hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec_core.rows.kernels.formulas import Logits, RowKernels, TargetRows
from deepspec_core.rows.large_buffer import large_buffer
from deepspec_core.rows.plan import Chunk


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
        beside: int,
        softcap: float | None,
        kernels: RowKernels | None,
    ) -> None:
        """`rows`: of any window; `beside`: of what `advance` takes along."""
        self._hidden_PH, self._head_VH, self._softcap, self._kernels = hidden_PH, head_VH, softcap, kernels
        self._buffer = large_buffer(rows + beside, len(head_VH), dtype=hidden_PH.dtype, device=hidden_PH.device)
        none = torch.zeros(0, dtype=torch.int64, device=hidden_PH.device)
        lse_U = hidden_PH.new_empty(0, dtype=torch.promote_types(hidden_PH.dtype, torch.float32))
        self.rows = TargetRows(self._logits(0), lse_U, none)

    def advance(self, chunk: Chunk, beside_NH: Tensor) -> Tensor:
        """Keep what the chunk or a later one needs, form what is new, and in the same product beside_NH @ head.T.

        That, [N, V], stays until the next advance and may be written to; beside_NH may have no rows. One product,
        because a product of a few dozen rows takes half as long as one of a few hundred.
        """
        assert chunk.kept_U is not None
        assert chunk.fresh_U is not None
        assert chunk.window_row_N is not None
        kept, size = len(chunk.kept_U), len(chunk.kept_U) + len(chunk.fresh_U)
        end = size + len(beside_NH)
        if kept:
            self._buffer[:kept] = self._buffer[chunk.kept_U]
        if end > kept:
            hidden_XH = torch.cat((self._hidden_PH[chunk.fresh_U], beside_NH))
            torch.mm(hidden_XH, self._head_VH.mT, out=self._buffer[kept:end])
        logits, lse_U = self._logits(size), self.rows.lse_U
        if self._kernels is not None:
            lse_U = lse_U[chunk.kept_U]
            if size > kept:
                lse_U = torch.cat((lse_U, self._kernels.normaliser(logits.rows(slice(kept, size)))))
        self.rows = TargetRows(logits, lse_U, chunk.window_row_N)
        return self._buffer[size:end]

    def argmax(self) -> Tensor:
        """[U] int64."""
        assert self._kernels is not None
        return self._kernels.argmax(self.rows.logits)

    def _logits(self, size: int) -> Logits:
        return Logits(self._buffer[:size], None, self._softcap)
