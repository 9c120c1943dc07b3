"""A trial of a run's training before its first stage: the draft's forward pass, the loss on its rows, the kernels.

The draft runs on fake tensors, so the trial takes no memory at any size. Loss terms then run for real on a few rows
that look like the draft's. Knows runs and contracts. Does not know stages or the disk.

Legend: N rows, P target positions, H hidden size, V vocabulary, r rank of the correction.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from deepspec_core.config.schema import PACKED
from deepspec_core.config.train_options import MUON
from deepspec_core.contracts.draft import DraftBatch, DraftDescription, DraftModel
from deepspec_core.contracts.loss import LossTerm, RowStats, Weighting
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.errors import DeepSpecError, PluginError
from deepspec_core.estimating.memory import fake_beside, fake_tensors, without_torch_messages
from deepspec_core.pipeline.made_up import made_up_batch, made_up_features, made_up_samples
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.training import new_draft
from deepspec_core.pipeline.trying_description import described
from deepspec_core.plugins.references import FAILURES, blame
from deepspec_core.rows.engine import RowEngine, build_engine
from deepspec_core.rows.rows_check import RowsError
from deepspec_core.rows.statistics import Undeclared
from deepspec_core.training.checkpoint import bytes_of_one
from deepspec_core.training.optimizers import hidden_matrices, no_matrices

log = logging.getLogger("deepspec")

_LENGTH = 128
_ROWS = 4
_VOCABULARY = 16
# torch's message when a fake tensor is to become an array; the exception has no class of its own.
_NO_NUMBERS = ".numpy() is not supported"
_CANNOT_WITHOUT_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@frozen(kw_only=True)
class Tried:
    """What the trial found out: the bytes of one checkpoint, and what the draft says of itself."""

    checkpoint_bytes: int
    description: DraftDescription


def try_draft(run: Run) -> tuple[DraftModel, Tried]:
    """Build the run's draft on fake tensors, so that an error in building or describing it is raised now."""
    _ = run.target.adapter  # opened first, because what a plugin makes on first use needs real memory
    with fake_tensors():
        draft = new_draft(run)
    return draft, Tried(checkpoint_bytes=bytes_of_one(draft), description=described(run, draft))


def try_training(run: Run, draft: DraftModel) -> None:
    """Run one forward pass of the draft, and the run's loss on rows like the draft's.

    Raises ConfigError if a term reads what the draft does not provide, if the chosen kernels cannot run, or if the
    draft has nothing for the chosen optimizer. Raises PluginError, which names the package, if the draft or a term
    fails.
    """
    if run.file.train.optimizer == MUON and not hidden_matrices(draft):
        raise no_matrices(sum(weight.requires_grad for weight in draft.parameters()))
    engine = build_engine(run.file.loss, run.plugins.registry)
    engine.choice(run.target.device.type, run.target.architecture.vocab_size)
    rows = _rows(run, draft)
    if rows is not None:
        heads = draft.heads()
        try:
            engine.check(rows, heads)
        except RowsError as error:
            raise error.of(draft) from error
        _try_loss(run, engine, rows, heads)


def _rows(run: Run, draft: DraftModel) -> Rows | None:
    """Rows of a made-up sample, or of two packed ones; None if the draft cannot run on fake tensors."""
    length, packs = min(_LENGTH, run.data.max_length), run.file.train.batching == PACKED
    try:
        with fake_beside(draft):
            features = made_up_features(run, length)
        samples = made_up_samples(2 if packs else 1, length, features)
        host = made_up_batch(draft, samples, run.file.run.seed, packed=packs)
        assert host.features is not None
        batch = DraftBatch(
            input_ids=host.input_ids,
            loss_mask=host.loss_mask,
            attention_mask=host.attention_mask,
            features=host.features,
            prepared=host.prepared,
            position_ids=host.position_ids,
            document_ids=host.document_ids,
        )
        bf16 = run.file.train.precision == "bfloat16"
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
        with without_torch_messages(), torch.no_grad(), autocast:
            rows: Rows = draft(batch)
            return rows
    except DeepSpecError:
        raise
    except FAILURES as error:
        if reads_numbers(error):
            log.info(
                "the draft's forward pass was not tried before the run, because it reads values of tensors (%s)",
                blame(error),
            )
            return None
        kind = run.file.draft.type
        raise PluginError(
            f"draft type {kind!r} fails on a made-up sample",
            where=run.plugins.registry.provider("draft", kind),
            found=blame(error),
        ) from error


def reads_numbers(error: BaseException) -> bool:
    """Whether it was raised because fake tensors have none."""
    return isinstance(error, _CANNOT_WITHOUT_NUMBERS) or _NO_NUMBERS in str(error)


def _try_loss(run: Run, engine: RowEngine, rows: Rows, heads: Heads) -> None:
    kind = run.file.loss.weighting.type
    weighting = _OneWeightARow(engine.weighting, kind, run.plugins.registry.provider("weighting", kind))
    for name, (term, coefficient) in engine.terms.items():
        package = run.plugins.registry.provider("loss", name)
        tried = few_rows, few_heads = _few(rows, heads)
        alone = RowEngine({name: (_OneValueARow(term, name, package), 1.0)}, weighting, kernels="plain")
        try:
            with warnings.catch_warnings():
                # One term alone leaves extras unread that other terms read.
                warnings.simplefilter("ignore", RuntimeWarning)
                alone(few_rows, few_heads).total.backward()
            if coefficient and not _reached(*tried):
                raise PluginError(
                    f"loss term {name!r} gives no gradient",
                    where=package,
                    found="the same value whatever the draft predicts, or one that was detached",
                    expected="a value that is computed from the differentiable statistics of `stats`",
                )
        except DeepSpecError:
            raise
        except FAILURES as error:
            raise PluginError(
                f"loss term {name!r} fails on made-up rows",
                where=package,
                found=blame(error),
            ) from error


class _OneValueARow:
    """A loss term that is refused if it returns anything else: torch would spread a single number over the rows."""

    def __init__(self, term: LossTerm, name: str, package: str) -> None:
        self._term, self._name, self._package = term, name, package

    def __call__(self, stats: RowStats) -> Tensor:
        try:
            value: Any = self._term(stats)
        except Undeclared as error:
            who = f"loss term {self._name!r}"
            raise Undeclared(error.read, error.attribute, who=who, where=self._package) from error
        problem = _not_one_a_row(value)
        if problem is None:
            return cast(Tensor, value)
        raise PluginError(
            f"loss term {self._name!r} does not return one number per row",
            where=self._package,
            found=problem,
            expected=f"a tensor of shape [{_ROWS}] for {_ROWS} rows, of a floating-point type, all finite",
            fix="return one value for each row, not their mean or sum",
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._term, name)


class _OneWeightARow:
    """A weighting that is refused if it returns anything but weights. Its failures are not a loss term's."""

    def __init__(self, weighting: Weighting, name: str, package: str) -> None:
        self._weighting, self._name, self._package = weighting, name, package

    def __call__(self, slot: Tensor, block: Tensor, stats: RowStats) -> Tensor:
        try:
            value: Any = self._weighting(slot, block, stats)
        except Undeclared as error:
            who = f"weighting {self._name!r}"
            raise Undeclared(error.read, error.attribute, who=who, where=self._package) from error
        problem = _not_one_a_row(value)
        if problem is None and bool((value < 0).any()):
            problem = f"a negative weight: {value.detach().min().item():g}"
        if problem is None and not bool(value.any()):
            problem = "0 for every row"
        if problem is None:
            return cast(Tensor, value)
        raise PluginError(
            f"weighting {self._name!r} does not return one weight per row",
            where=self._package,
            found=problem,
            expected=f"a tensor of shape [{_ROWS}] for {_ROWS} rows, of a floating-point type: finite, none negative, "
            "and not all 0",
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weighting, name)


def _not_one_a_row(value: Any) -> str | None:
    """What a term or a weighting returned, in words, unless it is one finite number for each made-up row."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.shape != (_ROWS,) or not value.is_floating_point():
        return f"{list(value.shape)}, {value.dtype}"
    return None if bool(value.isfinite().all()) else f"a value that is not finite: {value.tolist()}"


def _reached(rows: Rows, heads: Heads) -> bool:
    """Whether backward gave anything of these rows and heads a gradient that is not zero."""
    leaves = [rows.hidden, rows.correction, *rows.extras.values(), heads.correction]
    return any(leaf is not None and leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves)


def _few(rows: Rows, heads: Heads) -> tuple[Rows, Heads]:
    """A few real rows in two blocks, over a small vocabulary, with everything that the draft's rows have."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).requires_grad_()

    size, index_N = rows.hidden.shape[-1], torch.arange(_ROWS)
    by_slot = [len(head) for head in (heads.draft, heads.correction) if head is not None and head.dim() == 3]
    slots = min(2, *by_slot, _ROWS)
    few = evolve(
        rows,
        hidden=drawn(_ROWS, size),
        correction=None if rows.correction is None else drawn(_ROWS, rows.correction.shape[-1]),
        target_hidden=None if rows.target_hidden is None else drawn(_ROWS, size).detach(),
        target_index=None if rows.target_index is None else index_N,
        target_ids=None if rows.target_ids is None else index_N,
        weight=torch.ones(_ROWS),
        slot=index_N % slots,
        block=index_N // slots,
        extras={
            name: drawn(_ROWS, *extra.shape[1:])
            if extra.is_floating_point()
            else torch.zeros(_ROWS, *extra.shape[1:], dtype=extra.dtype)
            for name, extra in rows.extras.items()
        },
        denominator=None if rows.denominator is None else torch.ones(()),
    )
    head = target = drawn(_VOCABULARY, size).detach()
    if heads.draft.dim() == 3:
        head = drawn(len(heads.draft), _VOCABULARY, size).detach()
    ids_D = None
    if heads.draft_ids is not None:
        target, ids_D = drawn(2 * _VOCABULARY, size).detach(), torch.arange(_VOCABULARY)
    correction = None
    if heads.correction is not None:
        correction = drawn(*heads.correction.shape[:-2], _VOCABULARY, heads.correction.shape[-1])
    few_heads = evolve(heads, draft=head, target=target, correction=correction, draft_ids=ids_D)
    return few, few_heads
