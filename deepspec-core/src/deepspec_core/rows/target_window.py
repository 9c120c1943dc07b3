"""The target's logits that a chunk of rows is compared with. They are formed once for each position, and kept while
chunks need them.

Knows the plan's windows and the target's head. Does not know the rows, or which terms compare them.

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
    """The window. `advance` moves it to each chunk in turn; then `rows` are what the chunk's rows are compared with.

    Without `kernels`, the normalisers lse_U are not kept.
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
        """`rows` is the length of the longest window, `beside` that of the longest `beside_NH`."""
        self._hidden_PH, self._head_VH, self._softcap, self._kernels = hidden_PH, head_VH, softcap, kernels
        self._buffer = large_buffer(rows + beside, len(head_VH), dtype=hidden_PH.dtype, device=hidden_PH.device)
        none = torch.zeros(0, dtype=torch.int64, device=hidden_PH.device)
        lse_U = hidden_PH.new_empty(0, dtype=torch.promote_types(hidden_PH.dtype, torch.float32))
        self.rows = TargetRows(self._logits(0), lse_U, none)

    def advance(self, chunk: Chunk, beside_NH: Tensor) -> Tensor:
        """Keep the logits that this chunk or a later one needs, form the missing ones, and return beside_NH @ head.T.

        The result [N, V] comes from the same product. It stays until the next advance and may be written to. beside_NH
        may have no rows. One product serves both, because a product of a few dozen rows takes half as long as one of a
        few hundred.
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
        """The most probable token of each row of the window, [U] int64."""
        assert self._kernels is not None
        return self._kernels.argmax(self.rows.logits)

    def _logits(self, size: int) -> Logits:
        return Logits(self._buffer[:size], None, self._softcap)
