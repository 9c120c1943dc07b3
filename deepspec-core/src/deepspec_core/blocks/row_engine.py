"""The row engine: from rows to the weighted sum of loss terms and its gradients, without logits of all rows.

Logits of one chunk of whole blocks exist at a time. The forward pass computes a chunk's logits, statistics, terms and
at once the gradients of everything that needs one; only those gradients are kept, and backward scales them. Knows rows,
heads, terms and a weighting; not who made the rows, nor how sums are divided (training/reduction.py does that).

Legend: N rows, n rows of a chunk, P distinct target positions, u of them in a chunk, H hidden size, V vocabulary,
r rank of the correction.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from deepspec_core.blocks.row_metrics import Ratio, slot_metrics, survival_metrics
from deepspec_core.blocks.row_stats import ChunkStats
from deepspec_core.config.schema import LossOptions
from deepspec_core.contracts.loss import LossTerm, Weighting
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.errors import ConfigError
from deepspec_core.registry import Registry

# Logits of one chunk on an accelerator: 64 MiB in fp32, and a handful of such tensors. On CPU, what caches hold.
CHUNK_ELEMENTS = 1 << 24
CHUNK_ELEMENTS_CPU = 1 << 20

_EXTRA = "extras."


@frozen(kw_only=True, eq=False)
class RowResult:
    """What a batch of rows came to.

    total []: sum over rows of weight * sum_i coefficient_i * term_i, differentiable, not divided by anything.
    denominator []: what sums of this batch are divided by, with those of the whole optimizer step; detached.
    metrics: name -> (numerator, denominator), detached; ratios of sums, so they add over batches and ranks.
    """

    total: Tensor
    denominator: Tensor
    metrics: Mapping[str, Ratio] = field(factory=dict)


class RowEngine:
    """`engine(rows, heads)`: terms mixed with coefficients, rows weighted, gradients formed in chunks.

    `terms` maps the run file's names to (term, coefficient). `chunk_rows` is a target: a chunk holds whole blocks, and
    at least one; None sizes chunks by the vocabulary. Products run in the rows' dtype, or autocast's where that is on;
    statistics in fp32 (fp64 for fp64 rows).
    """

    def __init__(
        self, terms: Mapping[str, tuple[LossTerm, float]], weighting: Weighting, chunk_rows: int | None = None
    ) -> None:
        self.terms = dict(terms)
        self.weighting = weighting
        self.chunk_rows = chunk_rows
        self.needs_target = any(term.needs_target for term, _ in self.terms.values())
        self._casts: dict[str, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def __call__(self, rows: Rows, heads: Heads, *, with_metrics: bool = False) -> RowResult:
        """`with_metrics` adds accuracy and, where rows have a target, acceptance per slot to the loss figures.

        ConfigError where a term reads what these rows do not carry.
        """
        self._check(rows)
        inputs = {"hidden": rows.hidden, "draft_head": heads.draft}
        if rows.correction is not None:
            assert heads.correction is not None, "rows carry a correction, heads have none"
            inputs |= {"correction": rows.correction, "correction_head": heads.correction}
        inputs |= {_EXTRA + name: extra for name, extra in rows.extras.items() if extra.is_floating_point()}
        run = _Run(self, rows, heads, tuple(inputs), with_metrics)
        # Autocast would reach into the statistics; the dtype of products is chosen here, once.
        with torch.autocast(rows.hidden.device.type, enabled=False):
            total: Tensor = _RowSum.apply(  # type: ignore[no-untyped-call]
                run, torch.is_grad_enabled(), *inputs.values()
            )
        denominator = run.weight_sum if rows.denominator is None else rows.denominator.detach()
        metrics = {"loss": (total.detach(), denominator)}
        metrics |= {f"loss/{name}": (run.term_sums[name], denominator) for name in self.terms}
        if with_metrics:
            metrics |= slot_metrics(rows, correct_N=run.correct_N, acceptance_N=run.acceptance_N)
        if run.acceptance_N is not None and "confidence_logits" in rows.extras:
            metrics |= survival_metrics(
                "confidence",
                rows,
                survival_logits_N=rows.extras["confidence_logits"],
                acceptance_N=run.acceptance_N,
                weight_N=run.weight_N,
            )
        return RowResult(total=total, denominator=denominator, metrics=metrics)

    def _check(self, rows: Rows) -> None:
        for name, (term, _) in self.terms.items():
            if term.needs_target and rows.target_hidden is None:
                raise ConfigError(
                    f"loss term {name!r} compares with the target, but this draft's rows carry no target features",
                    where=f"[loss] terms.{name}",
                    fix=f"remove {name!r} from [loss] terms, or use a draft that provides target features",
                )
            missing = [extra for extra in term.needs_extras if extra not in rows.extras]
            if missing:
                raise ConfigError(
                    f"loss term {name!r} reads what this draft does not provide",
                    where=f"[loss] terms.{name}",
                    found=f"the draft provides: {', '.join(sorted(rows.extras)) or 'nothing beyond logits'}",
                    expected=", ".join(missing),
                    fix=f"remove {name!r} from [loss] terms, or enable the head it trains under [draft]",
                )

    def _chunk_size(self, vocab_size: int, device: torch.device) -> int:
        if self.chunk_rows is not None:
            return self.chunk_rows
        elements = CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS
        return max(1, elements // vocab_size)

    def _cast(self, name: str, head: Tensor, dtype: torch.dtype) -> Tensor:
        """`head`, detached, in the dtype of products; a frozen head's copy is kept, since it is the same each step."""
        if head.dtype == dtype or head.requires_grad:
            return head.detach().to(dtype)
        kept = self._casts.get(name)
        if kept is None or kept[0]() is not head or kept[1] != head._version or kept[2].dtype != dtype:
            kept = self._casts[name] = (weakref.ref(head), head._version, head.detach().to(dtype))
        return kept[2]


def build_engine(loss: LossOptions, registry: Registry) -> RowEngine:
    """The engine a run file's [loss] section asks for; `registry` finds terms and weightings by name."""
    weighting = registry.load("weighting", loss.weighting.type)
    options = loss.weighting.options
    return RowEngine(
        {name: (registry.load("loss", name)(), coefficient) for name, coefficient in loss.terms.items()},
        weighting() if options is None else weighting(options),
        loss.chunk_rows,
    )


def chunk_spans(block_N: Tensor, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Cut rows into (start, end), of whole blocks: at most `chunk_rows` rows each, or one block where it is longer."""
    num_rows = block_N.numel()
    if num_rows <= chunk_rows:
        if num_rows:
            yield 0, num_rows
        return
    _, counts_M = torch.unique_consecutive(block_N, return_counts=True)
    start = end = 0
    for count in counts_M.tolist():
        if end > start and end + count - start > chunk_rows:
            yield start, end
            start = end
        end += count
    yield start, end


class _Run:
    """One pass over the rows. After it: sums, figures per row, and gradients by input name."""

    def __init__(self, engine: RowEngine, rows: Rows, heads: Heads, names: tuple[str, ...], with_metrics: bool) -> None:
        self.engine, self.rows, self.heads, self.names = engine, rows, heads, names
        device, dtype = rows.hidden.device, rows.hidden.dtype
        self.product_dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
        self.stat_dtype = torch.promote_types(dtype, torch.float32)
        self.with_acceptance = with_metrics and rows.target_hidden is not None
        self.with_metrics = with_metrics
        zero = torch.zeros((), dtype=self.stat_dtype, device=device)
        self.total, self.weight_sum = zero, zero
        self.term_sums = dict.fromkeys(engine.terms, zero)
        self.correct_N = torch.zeros_like(rows.slot, dtype=torch.bool)
        self.acceptance_N = torch.zeros_like(rows.slot, dtype=self.stat_dtype) if self.with_acceptance else None
        self.weight_N = torch.zeros_like(rows.slot, dtype=self.stat_dtype)
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, inputs: Mapping[str, Tensor], wanted: tuple[str, ...]) -> Tensor:
        heads = {name: self.cast(name, inputs[name]) for name in inputs if name.endswith("_head")}
        target_head_VH = None
        compared = self.engine.needs_target or self.with_acceptance or self.rows.target_ids is None
        if self.rows.target_hidden is not None and compared:
            shared = self.heads.target is self.heads.draft
            target_head_VH = heads["draft_head"] if shared else self.cast("target_head", self.heads.target)
        for name in wanted:
            # Heads gather a share from every chunk: fp32. Rows are written once, by their own chunk.
            dtype = self.stat_dtype if name.endswith("_head") else inputs[name].dtype
            self.gradients[name] = torch.zeros_like(inputs[name], dtype=dtype)
        vocab_size = heads["draft_head"].shape[0]
        for start, end in chunk_spans(self.rows.block, self.engine._chunk_size(vocab_size, self.rows.hidden.device)):
            span = slice(start, end)
            leaves = {name: heads[name] if name in heads else tensor[span].detach() for name, tensor in inputs.items()}
            # detach() again: a kept cast must not be marked as requiring a gradient.
            leaves |= {name: leaves[name].detach().requires_grad_() for name in wanted}
            chunk_total = self._chunk(span, leaves, target_head_VH, bool(wanted))
            self.total = self.total + chunk_total.detach()
            if not chunk_total.requires_grad:
                continue
            found = torch.autograd.grad(chunk_total, [leaves[name] for name in wanted], allow_unused=True)
            for name, gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    into = self.gradients[name] if name in heads else self.gradients[name][span]
                    into.add_(gradient)
        return self.total

    def _chunk(
        self, span: slice, leaves: Mapping[str, Tensor], target_head_VH: Tensor | None, differentiable: bool
    ) -> Tensor:
        """Weighted sum of mixed terms over the chunk, []; figures are added up on the way."""
        rows = self.rows
        with torch.set_grad_enabled(differentiable):
            base_nV = self._logits(leaves["hidden"], leaves["draft_head"])
            draft_nV = base_nV
            if "correction" in leaves:
                correction_nr = leaves["correction"].to(self.product_dtype)
                draft_nV = base_nV + (correction_nr @ leaves["correction_head"].mT).to(self.stat_dtype)
        target_uV, target_row_n = None, None
        if target_head_VH is not None:
            assert rows.target_hidden is not None
            assert rows.target_index is not None, "rows with target features need target_index"
            position_u, target_row_n = torch.unique(rows.target_index[span], return_inverse=True)
            target_uV = self._logits(rows.target_hidden.detach()[position_u], target_head_VH)
        extras = {name: leaves.get(_EXTRA + name, extra[span]) for name, extra in rows.extras.items()}
        stats = ChunkStats(
            base_logits_NV=base_nV,
            draft_logits_NV=draft_nV,
            target_logits_UV=target_uV,
            target_row_N=target_row_n,
            target_ids_N=None if rows.target_ids is None else rows.target_ids[span],
            extras=extras,
            differentiable=differentiable,
        )
        mixed_n = torch.zeros_like(rows.weight[span], dtype=self.stat_dtype)
        with torch.set_grad_enabled(differentiable):
            values = {name: term(stats) for name, (term, _) in self.engine.terms.items()}
            for name, (_, coefficient) in self.engine.terms.items():
                mixed_n = mixed_n + coefficient * values[name]
        weight_n = rows.weight[span] * self.engine.weighting(rows.slot[span], rows.block[span], stats)
        weight_n = weight_n.detach().to(self.stat_dtype)
        self.weight_sum = self.weight_sum + weight_n.sum()
        self.weight_N[span] = weight_n
        for name, value_n in values.items():
            self.term_sums[name] = self.term_sums[name] + (weight_n * value_n.detach()).sum()
        if self.with_metrics:
            self.correct_N[span] = stats.draft_argmax == stats.target_ids
        if self.acceptance_N is not None:
            self.acceptance_N[span] = stats.acceptance
        with torch.set_grad_enabled(differentiable):
            return (weight_n * mixed_n).sum()

    def cast(self, name: str, head: Tensor) -> Tensor:
        return self.engine._cast(name, head, self.product_dtype)

    def _logits(self, hidden: Tensor, head_VH: Tensor) -> Tensor:
        logits = (hidden.to(self.product_dtype) @ head_VH.mT).to(self.stat_dtype)
        cap = self.heads.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class _RowSum(torch.autograd.Function):
    """The pass as one node of the graph: gradients are formed in forward, backward is linear in what comes in."""

    @staticmethod
    def forward(ctx: Any, run: _Run, grad_enabled: bool, *inputs: Tensor) -> Tensor:
        wanted = tuple(name for name, tensor in zip(run.names, inputs, strict=True) if tensor.requires_grad)
        ctx.wanted = wanted if grad_enabled else ()
        ctx.dtypes = {name: tensor.dtype for name, tensor in zip(run.names, inputs, strict=True)}
        ctx.names = run.names
        total = run(dict(zip(run.names, inputs, strict=True)), ctx.wanted)
        ctx.save_for_backward(*(run.gradients.pop(name) for name in ctx.wanted))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        saved = dict(zip(ctx.wanted, ctx.saved_tensors, strict=True))
        scaled = {name: (gradient * incoming).to(ctx.dtypes[name]) for name, gradient in saved.items()}
        return None, None, *(scaled.get(name) for name in ctx.names)
