"""The row engine: it turns rows into the weighted sum of loss terms and its gradients, without the logits of all rows.

The forward pass goes over the rows once, in chunks (chunk_pass.py), and forms every gradient that is needed. Only these
gradients are kept, and backward scales them. Knows which terms, weighting and kernels a run asks for. Does not know
which algorithm made the rows, or how sums are divided (training/reduction.py does that).

Legend: N rows, V the target's vocabulary, D the draft's, H hidden size.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspec_core.config.schema import LossOptions, TermOptions
from deepspec_core.contracts.loss import LossTerm, Weighting
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.errors import ConfigError
from deepspec_core.layers.product_weights import ProductWeights
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.chunk_pass import EXTRA, HEADS, PassSettings, RowPass
from deepspec_core.rows.coefficient_schedule import CoefficientSchedule
from deepspec_core.rows.footprint import Footprint, footprint
from deepspec_core.rows.head_gradient import add_scaled, scaled
from deepspec_core.rows.kernels.choice import Choice, choose_kernels
from deepspec_core.rows.metrics import Ratio, slot_metrics, survival_metrics
from deepspec_core.rows.rows_check import check_numbers, check_shapes, check_told
from deepspec_core.rows.term_check import check_members
from deepspec_core.rows.weighted import weighted


class RowResult(NamedTuple):
    """The loss of a batch of rows. It is a tuple, so that data parallelism finds the tensors in it.

    total: [], the sum over rows of weight * sum_i coefficient_i * term_i. Differentiable, and not divided by anything.
    denominator: [], this batch's part of what the sums of the optimizer step are divided by. Without gradient.
    metrics: By name, (numerator, denominator), without gradient. Each is added up over batches and ranks.
    """

    total: Tensor
    denominator: Tensor
    metrics: Mapping[str, Ratio]


class RowEngine:
    """`engine(rows, heads)` computes the loss of the rows and its gradients, in chunks.

    terms: By the run file's names, (term, coefficient). A coefficient may be a schedule over optimizer steps.
    chunk_rows: About how many rows a chunk has. It holds whole blocks, and at least one. None: the vocabulary decides.
    kernels: One of config.schema.KERNELS.

    Products are computed in the rows' dtype, or in autocast's if that is on. Statistics are in fp32 (fp64 for fp64
    rows).
    """

    def __init__(
        self,
        terms: Mapping[str, tuple[LossTerm, float | CoefficientSchedule]],
        weighting: Weighting,
        chunk_rows: int | None = None,
        *,
        kernels: str = "auto",
    ) -> None:
        self.terms = dict(terms)
        self.weighting = weighting
        self.chunk_rows = chunk_rows
        self.kernels = kernels
        # A weighting without such an attribute, or a term without `needs_logits`, does not read it.
        readers = {**{f"term {name}": term for name, (term, _) in terms.items()}, "the weighting": weighting}
        self.needs_target = any(getattr(reader, "needs_target", False) for reader in readers.values())
        self.needs_logits = [name for name, reader in readers.items() if getattr(reader, "needs_logits", False)]
        self.needs_uncorrected = any(getattr(reader, "needs_uncorrected", False) for reader in readers.values())
        self._warned = False
        self._casts: dict[str, tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self._known_ids: tuple[weakref.ref[Tensor], int] | None = None
        self._kept_inside: tuple[tuple[weakref.ref[Tensor], ...], tuple[int, ...], Tensor] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]
    def __call__(
        self,
        rows: Rows,
        heads: Heads,
        *,
        step: int = 0,
        with_metrics: bool = False,
        weights: ProductWeights | None = None,
    ) -> RowResult:
        """The loss of these rows at optimizer step `step`, counted from 0; coefficients may depend on it.

        Rows of weight 0 are not there: nothing that they hold counts. `with_metrics` adds accuracy per slot and, if the
        rows have a target, the acceptance rate per slot to the metrics. `weights` keep copies of trained heads, and say
        where their gradients go. Raises ConfigError if a term reads what these rows do not carry, or if the chosen
        kernels cannot run. Raises RowsError if the rows or the heads are not what the contract says.
        """
        self.check(rows, heads)
        self._warn_of_idle(rows)
        check_told(rows)
        rows = weighted(rows)
        check_numbers(rows, heads, new_ids=self._are_new(heads.draft_ids))
        inputs = {"hidden": rows.hidden, "draft_head": heads.draft}
        if rows.correction is not None:
            assert heads.correction is not None
            inputs |= {"correction": rows.correction, "correction_head": heads.correction}
        inputs |= {EXTRA + name: extra for name, extra in rows.extras.items() if extra.is_floating_point()}
        settings = self._settings(rows, heads, step, with_metrics)
        cast = self._cast_heads(heads, settings.product_dtype, weights)
        over = RowPass(settings, rows, cast, self._inside(heads, cast) if settings.compares else None)
        # Autocast would change the dtype of statistics too. The dtype of products is chosen here, once.
        with torch.autocast(rows.hidden.device.type, enabled=False):
            total: Tensor = _RowSum.apply(  # type: ignore[no-untyped-call]
                over, tuple(inputs), torch.is_grad_enabled(), weights, *inputs.values()
            )
        denominator = over.weight_sum if rows.denominator is None else rows.denominator.detach()
        metrics = {"loss": (total.detach(), denominator)}
        metrics |= {f"loss/{name}": (over.term_sums[name], denominator) for name in self.terms}
        if heads.draft_ids is not None:
            metrics["outside_vocabulary"] = _share(~over.inside_N)
        acceptance_N = over.acceptance_N if settings.compares and with_metrics else None
        if with_metrics:
            metrics |= slot_metrics(rows, correct_N=over.correct_N, acceptance_N=acceptance_N)
        if acceptance_N is not None and "confidence_logits" in rows.extras:
            metrics |= survival_metrics(
                "confidence",
                rows,
                survival_logits_N=rows.extras["confidence_logits"],
                acceptance_N=acceptance_N,
                weight_N=over.weight_N,
            )
        return RowResult(total, denominator, metrics)

    def footprint(self, rows: Rows, heads: Heads, *, dtype: torch.dtype, device_type: str) -> Footprint:
        """The memory and operations of a pass with gradients over such rows, with products in `dtype`.

        See footprint.py.
        """
        return footprint(
            self.choice(device_type, heads.draft.shape[-2]),
            rows,
            heads,
            chunk_rows=self.chunk_rows,
            compares=self._compares(rows),
            uncorrected=self.needs_uncorrected,
            dtype=dtype,
        )

    def choice(self, device_type: str, vocab_size: int) -> Choice:
        """The kernels that this engine runs on such a device. Tries out which can run."""
        return choose_kernels(
            self.kernels, device_type=device_type, vocab_size=vocab_size, needs_logits=self.needs_logits
        )

    def _compares(self, rows: Rows) -> bool:
        """Whether the target's logits are needed, for terms or for labels."""
        return rows.target_hidden is not None and (self.needs_target or rows.target_ids is None)

    def _settings(self, rows: Rows, heads: Heads, step: int, with_metrics: bool) -> PassSettings:
        device, dtype, vocab_size = rows.hidden.device, rows.hidden.dtype, heads.draft.shape[-2]
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        choice = self.choice(device.type, vocab_size)
        return PassSettings(
            terms={name: (term, _at(coefficient, step)) for name, (term, coefficient) in self.terms.items()},
            weighting=self.weighting,
            kernels=choice.kernels,
            chunk_rows=self.chunk_rows or choice.chunk_rows,
            most_kept=choice.chunk_rows,
            product_dtype=dtype,
            compares=self._compares(rows) or (with_metrics and rows.target_hidden is not None),
            uncorrected=self.needs_uncorrected,
            with_metrics=with_metrics,
        )

    def check(self, rows: Rows, heads: Heads) -> None:
        """Raise RowsError if shapes break the contract, ConfigError if a term reads what these rows do not carry."""
        check_shapes(rows, heads)
        if getattr(self.weighting, "needs_target", False) and rows.target_hidden is None:
            raise ConfigError(
                "the weighting compares with the target, but this draft's rows carry no target features",
                where="[loss] weighting",
                fix="choose another weighting, or use a draft that provides target features",
            )
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

    def _are_new(self, ids_D: Tensor | None) -> bool:
        """Whether these ids have not been checked before. Checking them waits for the device."""
        known = self._known_ids
        if ids_D is None or (known is not None and known[0]() is ids_D and known[1] == ids_D._version):
            return False
        self._known_ids = weakref.ref(ids_D), ids_D._version
        return True

    def _warn_of_idle(self, rows: Rows) -> None:
        """Warn once if no term reads an extra that the draft could train."""
        read = {extra for term, _ in self.terms.values() for extra in term.needs_extras}
        idle = [name for name, extra in rows.extras.items() if extra.requires_grad and name not in read]
        if idle and not self._warned:
            self._warned = True
            warnings.warn(
                f"no loss term trains the draft's {', '.join(idle)}: the head that gives it keeps its first weights; "
                "add a term that reads it to [loss] terms, or switch the head off under [draft]",
                RuntimeWarning,
                stacklevel=2,
            )

    def _cast_heads(self, heads: Heads, dtype: torch.dtype, weights: ProductWeights | None) -> Heads:
        def cast(name: str, head: Tensor) -> Tensor:
            if weights is not None and head.requires_grad and weights.dtype == dtype:
                return weights.values(head)
            return self._cast(name, head, dtype)

        draft = cast("draft_head", heads.draft)
        return Heads(
            draft=draft,
            target=draft if heads.target is heads.draft else cast("target_head", heads.target),
            correction=None if heads.correction is None else cast("correction_head", heads.correction),
            softcap=heads.softcap,
            draft_ids=heads.draft_ids,
            target_softcap=heads.target_softcap,
        )

    def _inside(self, heads: Heads, cast: Heads) -> Tensor | None:
        """The rows of the target's head for the draft's tokens; None if these are all. They are kept while the head is
        frozen and the tokens are the same.
        """
        if heads.draft_ids is None:
            return None
        given = (heads.target, heads.draft_ids)
        versions = tuple(tensor._version for tensor in given)
        kept = self._kept_inside
        same = kept is not None and all(ref() is tensor for ref, tensor in zip(kept[0], given, strict=True))
        if kept is None or not same or kept[1] != versions or kept[2].dtype != cast.target.dtype:
            inside_DH = cast.target.index_select(0, heads.draft_ids)
            kept = self._kept_inside = (tuple(weakref.ref(tensor) for tensor in given), versions, inside_DH)
        return kept[2]

    def _cast(self, name: str, head: Tensor, dtype: torch.dtype) -> Tensor:
        """`head` without gradient, in the dtype of products. The copy of a frozen head is kept for the next step."""
        if head.dtype == dtype or head.requires_grad:
            return head.detach().to(dtype)
        kept = self._casts.get(name)
        if kept is None or kept[0]() is not head or kept[1] != head._version or kept[2].dtype != dtype:
            kept = self._casts[name] = (weakref.ref(head), head._version, head.detach().to(dtype))
        return kept[2]


def build_engine(loss: LossOptions, registry: Registry) -> RowEngine:
    """The engine that a run file's [loss] section asks for. `registry` finds terms and weightings by name.

    Raises PluginError if one cannot be built, or a term does not say what it needs.
    """
    terms: dict[str, tuple[LossTerm, float | CoefficientSchedule]] = {}
    for name, entry in loss.terms.items():
        options, coefficient = (entry.options, entry.coefficient) if isinstance(entry, TermOptions) else (None, entry)
        term = registry.build_guarded("loss", name, *_given(options))
        check_members(term, name, registry.provider("loss", name))
        terms[name] = term, coefficient
    return RowEngine(
        terms,
        registry.build_guarded("weighting", loss.weighting.type, *_given(loss.weighting.options)),
        loss.chunk_rows,
        kernels=loss.kernels,
    )


def _share(of_N: Tensor) -> Ratio:
    return of_N.sum().to(torch.float32), torch.full_like(of_N, True, dtype=torch.float32).sum()


def _given(options: Any) -> tuple[Any, ...]:
    """The arguments of a component: its options, if it has any."""
    return () if options is None else (options,)


def _at(coefficient: float | CoefficientSchedule, step: int) -> float:
    return coefficient.at(step) if isinstance(coefficient, CoefficientSchedule) else coefficient


class _RowSum(torch.autograd.Function):
    """The pass as one node of the autograd graph. Forward forms the gradients; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        over: RowPass,
        names: tuple[str, ...],
        grad_enabled: bool,
        weights: ProductWeights | None,
        *inputs: Tensor,
    ) -> Tensor:
        given = dict(zip(names, inputs, strict=True))
        wanted = tuple(name for name, tensor in given.items() if tensor.requires_grad) if grad_enabled else ()
        ctx.names, ctx.wanted = names, wanted
        ctx.dtypes = {name: tensor.dtype for name, tensor in given.items()}
        ctx.weights, ctx.heads = weights, {name: given[name] for name in HEADS if name in wanted}
        total = over.run(given, wanted)
        gradients = over.gradients
        ctx.save_for_backward(*(gradients[name] for name in wanted))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        found: dict[str, Tensor] = {}
        for name, gradient in zip(ctx.wanted, ctx.saved_tensors, strict=True):
            head = ctx.heads.get(name)
            if head is not None and ctx.weights is not None and ctx.weights.gathers(head):
                add_scaled(gradient, incoming, into=head.grad)
            else:
                found[name] = scaled(gradient, incoming, ctx.dtypes[name])
        return None, None, None, None, *(found.get(name) for name in ctx.names)
