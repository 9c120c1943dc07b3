"""One pass over a batch's rows, chunk by chunk: products, statistics, terms, and at once all gradients.

Each vocabulary product is formed once forward and once backward, in buffers that chunks share; nothing of a chunk's
size outlives it. Knows rows, heads, terms, a weighting and kernels; not the autograd graph the pass is a node of.

Legend: N rows of the batch, n of a chunk, P distinct target positions, H hidden size, V vocabulary, r rank of the
correction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.blocks.fused_stats import FusedStats
from deepspec_core.blocks.plain_stats import PlainStats
from deepspec_core.blocks.row_kernels import Logits, RowKernels
from deepspec_core.blocks.row_plan import Chunk, plan_rows
from deepspec_core.blocks.target_window import TargetWindow
from deepspec_core.contracts.loss import LossTerm, Weighting
from deepspec_core.contracts.rows import Heads, Rows

EXTRA = "extras."
# Rows of a head taken at a time where its gradient is gone over.
HEAD_SLAB = 1 << 14


@frozen(kw_only=True, eq=False)
class PassSettings:
    """What a pass computes. `terms`: name -> (term, its coefficient now). `kernels` None: autograd through logits.

    `chunk_rows`: at most so many rows a chunk, where blocks allow; `most_kept`: of the target window, see plan_rows.
    """

    terms: Mapping[str, tuple[LossTerm, float]]
    weighting: Weighting
    kernels: RowKernels | None
    chunk_rows: int
    most_kept: int
    product_dtype: torch.dtype
    compares: bool  # the target's logits are needed
    with_metrics: bool


class RowPass:
    """`run` once. After it: sums and figures per row, and `gradients` by input name, of total with respect to each."""

    def __init__(self, settings: PassSettings, rows: Rows, heads: Heads) -> None:
        """`heads` in the dtype of products, detached."""
        self.settings, self.rows, self.heads = settings, rows, heads
        self.stat_dtype = torch.promote_types(rows.hidden.dtype, torch.float32)
        zero = torch.zeros((), dtype=self.stat_dtype, device=rows.hidden.device)
        self.total, self.weight_sum = zero, zero
        self.term_sums = dict.fromkeys(settings.terms, zero)
        self.correct_N = torch.zeros_like(rows.slot, dtype=torch.bool)
        self.acceptance_N = torch.zeros_like(rows.slot, dtype=self.stat_dtype)
        self.weight_N = torch.zeros_like(rows.slot, dtype=self.stat_dtype)
        self.gradients: dict[str, Tensor] = {}
        kernels = settings.kernels
        self.statistics: Callable[..., FusedStats | PlainStats] = (
            PlainStats if kernels is None else partial(FusedStats, kernels=kernels)
        )

    def run(self, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]) -> Tensor:
        """The total, []. `inputs`: hidden, draft_head, correction, correction_head, extras.*; gradients of `wanted`."""
        rows, settings = self.rows, self.settings
        for name in wanted:
            # Heads gather a share from every chunk: fp32. Rows are written once, by their own chunk.
            dtype = self.stat_dtype if name.endswith("_head") else inputs[name].dtype
            self.gradients[name] = torch.zeros_like(inputs[name], dtype=dtype)
        plan = plan_rows(
            rows.block,
            rows.target_index if settings.compares else None,
            chunk_rows=settings.chunk_rows,
            most_kept=settings.most_kept,
        )
        self.product_NV = self._empty(plan.most_rows)
        self.correction_NV = self._empty(plan.most_rows) if rows.correction is not None else None
        target = self._target(plan.window_rows) if settings.compares else None
        for chunk in plan.chunks:
            if target is not None:
                target.advance(chunk)
            self._chunk(chunk, target, inputs, wanted)
        del self.product_NV, self.correction_NV
        return self.total

    def _empty(self, rows: int) -> Tensor:
        vocab_size = self.heads.draft.shape[0]
        return torch.empty(rows, vocab_size, dtype=self.settings.product_dtype, device=self.rows.hidden.device)

    def _target(self, window_rows: int) -> TargetWindow:
        assert self.rows.target_hidden is not None
        assert self.rows.target_index is not None, "rows with target features need target_index"
        return TargetWindow(
            self.rows.target_hidden.detach().to(self.settings.product_dtype),
            self.heads.target,
            rows=window_rows,
            softcap=self.heads.softcap,
            kernels=self.settings.kernels,
        )

    def _chunk(
        self, chunk: Chunk, target: TargetWindow | None, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]
    ) -> None:
        rows, span = self.rows, chunk.span
        products = _Products(self, span, inputs)
        leaves = {name: inputs[name][span].detach().requires_grad_() for name in wanted if name.startswith(EXTRA)}
        stats = self.statistics(
            draft=products.logits,
            target=target,
            target_ids_N=None if rows.target_ids is None else rows.target_ids[span],
            extras={name: leaves.get(EXTRA + name, extra[span].detach()) for name, extra in rows.extras.items()},
            differentiable=len(leaves) < len(wanted),
        )
        terms = self.settings.terms
        mixed_n = torch.zeros_like(rows.weight[span], dtype=self.stat_dtype)
        with torch.set_grad_enabled(bool(wanted)):
            values = {name: term(stats) for name, (term, _) in terms.items()}
            for name, (_, coefficient) in terms.items():
                mixed_n = mixed_n + coefficient * values[name]
        weight_n = rows.weight[span] * self.settings.weighting(rows.slot[span], rows.block[span], stats)
        weight_n = weight_n.detach().to(self.stat_dtype)
        self.weight_sum = self.weight_sum + weight_n.sum()
        self.weight_N[span] = weight_n
        for name, value_n in values.items():
            self.term_sums[name] = self.term_sums[name] + (weight_n * value_n.detach()).sum()
        if self.settings.with_metrics:
            self.correct_N[span] = stats.draft_argmax == stats.target_ids
        if self.settings.with_metrics and target is not None:
            self.acceptance_N[span] = stats.acceptance
        with torch.set_grad_enabled(bool(wanted)):
            total = (weight_n * mixed_n).sum()
        self.total = self.total + total.detach()
        if not total.requires_grad:
            return
        product_nV, correction_nV, of_extras = stats.gradient(total, leaves)
        for name, gradient in zip(leaves, of_extras, strict=True):
            if gradient is not None:
                self.gradients[name][span] = gradient
        if product_nV is not None:
            products.backward(product_nV, correction_nV, self.gradients)


class _Products:
    """The draft's products of one chunk, and their gradients: the only places where rows meet the vocabulary."""

    def __init__(self, over: RowPass, span: slice, inputs: Mapping[str, Tensor]) -> None:
        dtype, size = over.settings.product_dtype, span.stop - span.start
        self.span, self.heads = span, over.heads
        self.hidden_nH = inputs["hidden"][span].detach().to(dtype)
        product_nV = torch.mm(self.hidden_nH, self.heads.draft.mT, out=over.product_NV[:size])
        correction_nV = None
        if over.correction_NV is not None:
            assert self.heads.correction is not None
            self.correction_nr = inputs["correction"][span].detach().to(dtype)
            correction_nV = torch.mm(self.correction_nr, self.heads.correction.mT, out=over.correction_NV[:size])
        self.logits = Logits(product_nV, correction_nV, self.heads.softcap)

    def backward(self, product_nV: Tensor, correction_nV: Tensor | None, gradients: Mapping[str, Tensor]) -> None:
        """From the gradients of the two products to those of their factors, into `gradients`, where they are wanted."""
        self._backward(product_nV, self.hidden_nH, self.heads.draft, gradients, "hidden", "draft_head")
        if correction_nV is not None:
            assert self.heads.correction is not None
            self._backward(
                correction_nV, self.correction_nr, self.heads.correction, gradients, "correction", "correction_head"
            )

    def _backward(
        self, of_nV: Tensor, row_nX: Tensor, head_VX: Tensor, gradients: Mapping[str, Tensor], rows: str, head: str
    ) -> None:
        if rows in gradients:
            gradients[rows][self.span] = of_nV @ head_VX
        if head in gradients:
            # In slabs of the vocabulary: the sum's conversion to fp32 then happens in caches, not through memory.
            for of_nS, into_SX in zip(
                torch.split(of_nV, HEAD_SLAB, dim=1), torch.split(gradients[head], HEAD_SLAB), strict=True
            ):
                into_SX.add_(of_nS.mT @ row_nX)
