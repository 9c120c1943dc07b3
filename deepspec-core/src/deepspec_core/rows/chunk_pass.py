"""One pass over a batch's rows, chunk by chunk. It forms products, statistics, terms, and at once all gradients.

Each product with a vocabulary head is computed once forward and once backward, in buffers that all chunks share. When
the pass is over, no tensor of a chunk's size is left. Knows rows, heads, terms, a weighting and kernels. Does not know
the autograd graph, of which the pass is one node.

Legend: N rows of the batch, n of a chunk, P distinct target positions, H hidden size, V the draft's vocabulary, W the
target's, r rank of the correction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.contracts.loss import LossTerm, Weighting
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.fused_statistics import FusedStats
from deepspec_core.rows.head_gradient import HeadGradient, SlotHeadsGradient, head_gradient
from deepspec_core.rows.host_side import host_side
from deepspec_core.rows.kernels.formulas import Logits, RowKernels
from deepspec_core.rows.large_buffer import large_buffer
from deepspec_core.rows.plain_statistics import PlainStats
from deepspec_core.rows.plan import Chunk, RowPlan, plan_rows
from deepspec_core.rows.reduced_vocabulary import ReducedVocabulary
from deepspec_core.rows.slot_heads import gradient_of_rows, groups_of, multiply
from deepspec_core.rows.target_window import TargetWindow
from deepspec_core.rows.term_check import one_a_row

EXTRA = "extras."
HEADS = ("draft_head", "correction_head")


@frozen(kw_only=True, eq=False)
class PassSettings:
    """What a pass computes.

    terms: By name, the term and its coefficient at this step.
    kernels: None means autograd through the logits.
    chunk_rows: The largest number of rows in a chunk; a single longer block is still one chunk.
    most_kept: The largest number of rows that the target window keeps; see plan_rows.
    """

    terms: Mapping[str, tuple[LossTerm, float]]
    weighting: Weighting
    kernels: RowKernels | None
    chunk_rows: int
    most_kept: int
    product_dtype: torch.dtype
    compares: bool  # the target's logits are needed
    uncorrected: bool  # a term or weighting reads statistics from before the correction
    with_metrics: bool


def keeps_apart(rows: Rows, heads: Heads, *, uncorrected: bool) -> bool:
    """Whether the correction needs a tensor of its own: because of a cap, or because something reads uncorrected
    logits.
    """
    return rows.correction is not None and (heads.softcap is not None or uncorrected)


class RowPass:
    """One pass. After `run`, which is called once, it holds sums, figures per row, and the total's `gradients`."""

    def __init__(self, settings: PassSettings, rows: Rows, heads: Heads, inside_VH: Tensor | None = None) -> None:
        """`heads` are detached and in the dtype of the products, and `rows` come from `weighted`.

        `inside_VH` are the rows of the target's head for a reduced vocabulary.
        """
        self.settings, self.rows, self.heads, self.inside_VH = settings, rows, heads, inside_VH
        self.host = host_side(rows)
        ids = heads.draft_ids
        self.reduced = None if ids is None else ReducedVocabulary(ids, len(heads.target))
        self.stat_dtype = torch.promote_types(rows.hidden.dtype, torch.float32)
        zero = torch.zeros((), dtype=self.stat_dtype, device=rows.hidden.device)
        self.total, self.weight_sum = zero, zero
        self.term_sums = dict.fromkeys(settings.terms, zero)
        self.correct_N = torch.zeros_like(rows.slot, dtype=torch.bool)
        self.acceptance_N = torch.zeros_like(rows.slot, dtype=self.stat_dtype)
        self.weight_N = torch.zeros_like(rows.slot, dtype=self.stat_dtype)
        self.inside_N = torch.ones_like(rows.slot, dtype=torch.bool)
        self._heads: dict[str, HeadGradient | SlotHeadsGradient] = {}
        self._rows: dict[str, Tensor] = {}
        kernels = settings.kernels
        self.statistics: Callable[..., FusedStats | PlainStats] = (
            PlainStats if kernels is None else partial(FusedStats, kernels=kernels)
        )

    def run(self, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]) -> Tensor:
        """The total, []. Gradients are formed for the inputs in `wanted`.

        Names of `inputs` are hidden, draft_head, correction, correction_head and extras.*.
        """
        rows, settings = self.rows, self.settings
        plan = plan_rows(
            self.host["block"],
            self.host["target_index"] if settings.compares else None,
            chunk_rows=settings.chunk_rows,
            most_kept=settings.most_kept,
            device=rows.hidden.device,
        )
        # A row's gradient comes from its own chunk; a head's is a sum over all chunks.
        gathered = settings.product_dtype if len(plan.chunks) == 1 else self.stat_dtype
        self._heads = {name: head_gradient(inputs[name], gathered) for name in wanted if name in HEADS}
        self._rows = {name: torch.zeros_like(inputs[name]) for name in wanted if name not in HEADS}
        # Where one head serves draft and target, one product forms the logits of both, in the window's buffer.
        one_head = settings.compares and self.heads.target is self.heads.draft
        self.product_NV = None if one_head else self._empty(plan.most_rows)
        apart = keeps_apart(rows, self.heads, uncorrected=settings.uncorrected)
        self.correction_NV = self._empty(plan.most_rows) if apart else None
        target = self._target(plan) if settings.compares else None
        for chunk in plan.chunks:
            self._chunk(chunk, target, inputs, wanted)
        del self.product_NV, self.correction_NV
        return self.total

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the total, by the name of the input."""
        return self._rows | {name: head.sum for name, head in self._heads.items()}

    def _empty(self, rows: int) -> Tensor:
        shape = rows, self.heads.draft.shape[-2]
        return large_buffer(*shape, dtype=self.settings.product_dtype, device=self.rows.hidden.device)

    def _target(self, plan: RowPlan) -> TargetWindow:
        assert self.rows.target_hidden is not None
        assert self.rows.target_index is not None, "rows with target features need target_index"
        return TargetWindow(
            self.rows.target_hidden.detach().to(self.settings.product_dtype),
            self.heads.target if self.inside_VH is None else self.inside_VH,
            rows=plan.window_rows,
            beside=plan.most_rows if self.product_NV is None else 0,
            softcap=self.heads.target_softcap,
            kernels=self.settings.kernels,
            whole_head_VH=None if self.inside_VH is None else self.heads.target,
            # As many logits as a chunk has.
            whole_rows=max(1, self.settings.most_kept * self.heads.draft.shape[-2] // len(self.heads.target)),
        )

    def _chunk(
        self, chunk: Chunk, target: TargetWindow | None, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]
    ) -> None:
        rows, span = self.rows, chunk.span
        products = _Products(self, chunk, target, inputs)
        leaves = {name: inputs[name][span].detach().requires_grad_() for name in wanted if name.startswith(EXTRA)}
        stats = self.statistics(
            draft=products.logits,
            target=target,
            target_ids_N=None if rows.target_ids is None else rows.target_ids[span],
            extras={name: leaves.get(EXTRA + name, extra[span].detach()) for name, extra in rows.extras.items()},
            differentiable=len(leaves) < len(wanted),
            uncorrected=rows.correction is None or self.settings.uncorrected,
            reduced=self.reduced,
        )
        terms = self.settings.terms
        mixed_n = torch.zeros_like(rows.weight[span], dtype=self.stat_dtype)
        with torch.set_grad_enabled(bool(wanted)):
            values = {
                name: one_a_row(term(stats), span.stop - span.start, f"loss term {name!r}")
                for name, (term, _) in terms.items()
            }
            for name, (_, coefficient) in terms.items():
                mixed_n = mixed_n + coefficient * values[name]
        factor_n = self.settings.weighting(rows.slot[span], rows.block[span], stats)
        weight_n = rows.weight[span] * one_a_row(factor_n, span.stop - span.start, "the weighting")
        weight_n = weight_n.detach().to(self.stat_dtype)
        if self.reduced is not None:
            self.inside_N[span] = inside_n = self.reduced.columns(stats.target_ids) >= 0
            weight_n = weight_n * inside_n
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
                self._rows[name][span] = gradient
        if product_nV is not None:
            products.backward(product_nV, correction_nV, self._rows, self._heads)


class _Products:
    """The draft's products of one chunk with its heads, and their gradients."""

    def __init__(self, over: RowPass, chunk: Chunk, target: TargetWindow | None, inputs: Mapping[str, Tensor]) -> None:
        """Also advances `target` to the chunk."""
        self.span, self.heads = chunk.span, over.heads
        heads = (self.heads.draft, self.heads.correction)
        by_slot = any(head is not None and head.dim() == 3 for head in heads)
        self.groups = groups_of(over.host["slot"][self.span], over.rows.hidden.device) if by_slot else ()
        dtype, size = over.settings.product_dtype, chunk.span.stop - chunk.span.start
        self.hidden_nH = inputs["hidden"][self.span].detach().to(dtype)
        if over.product_NV is None:
            assert target is not None
            product_nV = target.advance(chunk, self.hidden_nH)
        else:
            if target is not None:
                target.advance(chunk, self.hidden_nH[:0])
            product_nV = multiply(self.hidden_nH, self.heads.draft, self.groups, out=over.product_NV[:size])
        correction_nV, self.correction_nr = None, None
        if over.rows.correction is not None:
            assert self.heads.correction is not None
            self.correction_nr = inputs["correction"][self.span].detach().to(dtype)
            if over.correction_NV is None:
                multiply(self.correction_nr, self.heads.correction, self.groups, out=product_nV, add=True)
            else:
                out_nV = over.correction_NV[:size]
                correction_nV = multiply(self.correction_nr, self.heads.correction, self.groups, out=out_nV)
        self.logits = Logits(product_nV, correction_nV, self.heads.softcap)

    def backward(
        self,
        product_nV: Tensor,
        correction_nV: Tensor | None,
        rows: Mapping[str, Tensor],
        heads: Mapping[str, HeadGradient | SlotHeadsGradient],
    ) -> None:
        """Compute the gradients of the products' factors, and put those that are wanted into `rows` and `heads`.

        The arguments are the gradients of the products. If correction_nV is None, the correction was added in place,
        and product_nV is the gradient of its product too.
        """
        self._backward("hidden", product_nV, self.hidden_nH, self.heads.draft, rows, heads.get("draft_head"))
        if self.correction_nr is not None:
            assert self.heads.correction is not None
            of_nV = product_nV if correction_nV is None else correction_nV
            head = heads.get("correction_head")
            self._backward("correction", of_nV, self.correction_nr, self.heads.correction, rows, head)

    def _backward(
        self,
        name: str,
        of_nV: Tensor,
        row_nX: Tensor,
        head: Tensor,
        rows: Mapping[str, Tensor],
        gradient: HeadGradient | SlotHeadsGradient | None,
    ) -> None:
        if name in rows:
            rows[name][self.span] = gradient_of_rows(of_nV, head, self.groups)
        if gradient is not None:
            gradient.add(of_nV, row_nX, self.groups)
