"""The target's logits that a chunk of rows is compared with. They are formed once for each position, and kept while
chunks need them.

With a reduced vocabulary they are those of the draft's tokens. Of the whole vocabulary, the normaliser and the argmax
of each position are formed as soon as a statistic asks for them. Knows the plan's windows and the target's head. Does
not know the rows, or which terms compare them.

Legend: P distinct target positions, U rows of the window, N rows of the chunk, X rows of a product, V the target's
vocabulary, D the draft's, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec_core.rows.kernels.formulas import Logits, RowKernels, TargetRows, TorchKernels
from deepspec_core.rows.large_buffer import large_buffer
from deepspec_core.rows.plan import Chunk


class TargetWindow:
    """The window. `advance` moves it to each chunk in turn; then `rows` are what the chunk's rows are compared with.

    Without `kernels`, the normalisers lse_U are not kept.
    """

    def __init__(
        self,
        hidden_PH: Tensor,
        head_DH: Tensor,
        *,
        rows: int,
        beside: int,
        softcap: float | None,
        kernels: RowKernels | None,
        whole_head_VH: Tensor | None = None,
        whole_rows: int = 1,
    ) -> None:
        """`rows` is the length of the longest window, `beside` that of the longest `beside_NH`.

        `whole_head_VH` is the target's whole head where `head_DH` has some of its rows. It is multiplied with at most
        `whole_rows` positions at once.
        """
        self._hidden_PH, self._head_DH, self._softcap, self._kernels = hidden_PH, head_DH, softcap, kernels
        self._buffer = large_buffer(rows + beside, len(head_DH), dtype=hidden_PH.dtype, device=hidden_PH.device)
        none = torch.zeros(0, dtype=torch.int64, device=hidden_PH.device)
        self._whole_head_VH, self._whole_rows, self._positions_U = whole_head_VH, whole_rows, none
        self._whole: tuple[Tensor, Tensor] | None = None
        lse_U = hidden_PH.new_empty(0, dtype=torch.promote_types(hidden_PH.dtype, torch.float32))
        self.rows = TargetRows(self._logits(0), lse_U, none)

    def advance(self, chunk: Chunk, beside_NH: Tensor) -> Tensor:
        """Keep the logits that this chunk or a later one needs, form the missing ones, and return beside_NH @ head.T.

        The result [N, D] comes from the same product. It stays until the next advance and may be written to. beside_NH
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
            torch.mm(hidden_XH, self._head_DH.mT, out=self._buffer[kept:end])
        logits, lse_U = self._logits(size), self.rows.lse_U
        if self._kernels is not None:
            lse_U = lse_U[chunk.kept_U]
            if size > kept:
                lse_U = torch.cat((lse_U, self._kernels.normaliser(logits.rows(slice(kept, size)))))
        self.rows = TargetRows(logits, lse_U, chunk.window_row_N)
        if self._whole_head_VH is not None:
            self._positions_U = torch.cat((self._positions_U[chunk.kept_U], chunk.fresh_U))
            if self._whole is not None:
                pairs = zip(self._whole, self._figures(chunk.fresh_U), strict=True)
                self._whole = tuple(torch.cat((known_U[chunk.kept_U], new_X)) for known_U, new_X in pairs)  # type: ignore[assignment]
        return self._buffer[size:end]

    def argmax(self) -> Tensor:
        """The target's most probable token at each row of the window, [U] int64."""
        if self._whole_head_VH is not None:
            return self.of_whole()[1]
        assert self._kernels is not None
        return self._kernels.argmax(self.rows.logits)

    def whole_rows(self) -> TargetRows:
        """`rows` with the normalisers of the whole vocabulary."""
        return self.rows if self._whole_head_VH is None else self.rows._replace(whole_lse_U=self.of_whole()[0])

    def of_whole(self) -> tuple[Tensor, Tensor]:
        """The normaliser and the argmax over the target's whole vocabulary, [U] each. If it is reduced."""
        if self._whole is None:
            self._whole = self._figures(self._positions_U)
        return self._whole

    def _figures(self, positions_X: Tensor) -> tuple[Tensor, Tensor]:
        """The normaliser and the argmax over the whole vocabulary at these positions."""
        assert self._whole_head_VH is not None
        kernels = TorchKernels(compiled=False) if self._kernels is None else self._kernels
        lse: list[Tensor] = [self.rows.lse_U[:0]]
        argmax: list[Tensor] = [positions_X[:0]]
        for start in range(0, len(positions_X), self._whole_rows):
            hidden_XH = self._hidden_PH[positions_X[start : start + self._whole_rows]]
            logits = Logits(hidden_XH @ self._whole_head_VH.mT, None, self._softcap)
            lse.append(kernels.normaliser(logits))
            argmax.append(kernels.argmax(logits))
        return torch.cat(lse), torch.cat(argmax)

    def _logits(self, size: int) -> Logits:
        return Logits(self._buffer[:size], None, self._softcap)
