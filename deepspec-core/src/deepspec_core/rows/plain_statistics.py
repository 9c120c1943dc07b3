"""Statistics of one chunk of rows by autograd through its logits. They are the reference, and serve terms that read
logits themselves.

Knows logits and labels. Does not know which terms read what, or how they are reduced.

Legend: N rows of the chunk, U rows of the target window, V the draft's vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepspec_core.rows.kernels.formulas import Logits, logit_values
from deepspec_core.rows.reduced_vocabulary import ReducedVocabulary
from deepspec_core.rows.statistics import ChunkStats
from deepspec_core.rows.target_window import TargetWindow


class PlainStats(ChunkStats):
    """ChunkStats whose leaves are the chunk's products, and the gradients of these leaves."""

    def __init__(
        self,
        *,
        draft: Logits,
        target: TargetWindow | None,
        target_ids_N: Tensor | None,
        extras: Mapping[str, Tensor],
        differentiable: bool,
        uncorrected: bool,
        reduced: ReducedVocabulary | None = None,
    ) -> None:
        """`draft` is [N, V].

        If target_ids_N is None, the target's argmax is the label. `uncorrected`: see FusedStats.
        """
        self._product_NV = draft.product.detach().requires_grad_(differentiable)
        self._correction_NV = None
        with torch.set_grad_enabled(differentiable):
            base_NV = draft_NV = logit_values(Logits(self._product_NV, None, draft.softcap))
            if draft.correction is not None:
                self._correction_NV = draft.correction.detach().requires_grad_(differentiable)
                draft_NV = base_NV + self._correction_NV
        super().__init__(
            base_logits_NV=base_NV if uncorrected else None,
            draft_logits_NV=draft_NV,
            target_logits_UV=None if target is None else logit_values(target.rows.logits),
            target_row_N=None if target is None else target.rows.row_N,
            target_ids_N=target_ids_N,
            extras=extras,
            differentiable=differentiable,
            reduced=reduced,
            whole=None if target is None or reduced is None else target.of_whole,
        )

    def gradient(
        self, total: Tensor, extras: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """The gradients of `total` by product [N, V], by correction [N, V] (None without one), and by each of `extras`.

        `total` [] is computed from this object's statistics and extras. If it does not depend on the logits, the first
        two are None.
        """
        leaves = [self._product_NV] if self._correction_NV is None else [self._product_NV, self._correction_NV]
        found = torch.autograd.grad(total, [*leaves, *extras.values()], allow_unused=True)
        product_NV, of_extras = found[0], found[len(leaves) :]
        if self._correction_NV is None or product_NV is None:
            return product_NV, None, of_extras
        return product_NV, torch.zeros_like(self._correction_NV) if found[1] is None else found[1], of_extras
