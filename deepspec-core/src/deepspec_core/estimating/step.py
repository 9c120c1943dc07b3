"""Memory and operations of one optimizer step: the training code itself runs on tensors that take no memory.

Every part of a step runs: the batch goes to the device, features are loaded or computed, the draft runs forward and
backward, the optimizer updates. Live bytes and matrix products are counted meanwhile. Only the row engine does not run;
it reports what it would take, because that depends on its chunks. Knows drafts, engines and batches; does not know run
files, a device's allocator or processes.

Legend: N rows, P distinct target positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.config.train_options import MUON, TrainOptions
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.estimating.flops import flop_counter
from deepspec_core.estimating.memory import LiveBytes, bytes_of
from deepspec_core.estimating.process import HEAP_BLOCK
from deepspec_core.rows.engine import RowEngine, RowResult
from deepspec_core.training.host_batch import HostBatch
from deepspec_core.training.optimizers import build_optimizer, hidden_matrices
from deepspec_core.training.reduction import normalise
from deepspec_core.training.step import TrainingStep


@frozen(kw_only=True)
class StepEstimate:
    """The estimate of one step.

    held: Bytes held during the whole step, by what they hold.
    phases: The most bytes in addition to `held`, by part of the step.
    small: The most bytes in storages of at most `process.HEAP_BLOCK` bytes each.
    flops: Operations of one micro-batch, by part; "update" is that of a whole step.
    rows, positions: N and P of the micro-batch.
    """

    held: Mapping[str, int]
    phases: Mapping[str, int]
    small: int
    flops: Mapping[str, int]
    rows: int
    positions: int


def estimate_step(
    *,
    draft: DraftModel,
    engine: RowEngine,
    batch: HostBatch,
    source: FeatureSource,
    device_type: str,
    compute_dtype: torch.dtype,
    accumulates: bool,
    options: TrainOptions,
) -> StepEstimate:
    """The memory and operations of a step with this micro-batch. `draft`, and the modules that `source` computes with,
    were made under `fake_tensors`. The draft's weights get the dtypes that training gives them.

    `accumulates`: earlier micro-batches of the step have been computed. Their gradients then exist already, and the
    previous batch exists until this one is loaded. `options` choose the optimizer. `device_type` is the row engine's;
    everything else runs as on the CPU.
    """
    for parameter in draft.parameters():
        # As training does: fp32 master weights; frozen ones as they are.
        if parameter.requires_grad or compute_dtype == torch.float32:
            parameter.data = parameter.data.to(torch.float32)
    named = {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}
    trained = list(named.values())
    matrices = hidden_matrices(draft) if options.optimizer == MUON else frozenset()
    optimizer = build_optimizer(named, options, matrices=matrices, fused=True)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    moments = bytes_of(value for state in optimizer.state.values() for value in state.values())
    if not accumulates:
        optimizer.zero_grad(set_to_none=True)
    rows = _EngineStandIn(engine, LiveBytes(HEAP_BLOCK), compute_dtype, device_type)
    step = TrainingStep(draft.train(), cast(RowEngine, rows), compute_dtype=compute_dtype)
    phases: dict[str, int] = {}
    flops: dict[str, int] = {}
    with rows.live as live, flop_counter() as counter:

        def counted(part: str) -> None:
            flops[part] = counter.get_total_flops() - sum(flops.values())

        with live.phase("features", phases):
            draft_batch = batch.to_draft_batch(source, torch.device("cpu"))
        if accumulates:
            phases["features"] += live.now
        counted("features")
        with live.phase("forward", phases):
            result = step(draft_batch)
        counted("draft_forward")
        phases["rows"] = rows.most
        with live.phase("backward", phases):
            result.total.backward()
        counted("draft_backward")
        del result
        with live.phase("update", phases):
            normalise(trained, torch.ones(()), world_size=1, clip_norm=1.0)
            optimizer.step()
        counted("update")
    flops["rows"] = rows.flops
    frozen = [parameter for parameter in draft.parameters() if not parameter.requires_grad]
    return StepEstimate(
        held={
            "trained_weights": bytes_of(trained),
            "frozen_weights": bytes_of([*frozen, *draft.buffers()]),
            "head_copies": rows.head_copies,
            "optimizer_moments": moments,
            "gradients": bytes_of(trained) if accumulates else 0,
        },
        phases=phases,
        small=rows.live.most_small,
        flops=flops,
        rows=rows.rows,
        positions=rows.positions,
    )


class _EngineStandIn:
    """Replaces the row engine: reports the memory that it would take, and returns gradients of the same sizes.

    `most`: live bytes while the engine would run. `head_copies`: bytes of the copies of frozen heads in the dtype of
    products, which the engine keeps.
    """

    def __init__(self, engine: RowEngine, live: LiveBytes, compute_dtype: torch.dtype, device_type: str) -> None:
        self.engine, self.live = engine, live
        self.compute_dtype, self.device_type = compute_dtype, device_type
        self.most, self.flops, self.head_copies = 0, 0, 0
        self.rows, self.positions = 0, 0

    def __call__(self, rows: Rows, heads: Heads, **_: Any) -> RowResult:
        self.rows = rows.hidden.shape[0]
        self.positions = 0 if rows.target_hidden is None else rows.target_hidden.shape[0]
        dtype = torch.bfloat16 if self.compute_dtype == torch.bfloat16 else rows.hidden.dtype
        footprint = self.engine.footprint(rows, heads, dtype=dtype, device_type=self.device_type)
        self.most = self.live.now + footprint.workspace_bytes + footprint.gradient_bytes
        self.flops = footprint.flops
        kept = {id(head): head for head in (heads.draft, heads.target) if not head.requires_grad}
        self.head_copies = sum(head.numel() * dtype.itemsize for head in kept.values() if head.dtype != dtype)
        if heads.draft_ids is not None:
            self.head_copies += heads.draft.numel() * dtype.itemsize  # the same rows of the target's head
        inputs = [rows.hidden, rows.correction, *rows.extras.values(), heads.draft, heads.correction]
        total: Tensor = _MadeUpGradients.apply(  # type: ignore[no-untyped-call]
            *(tensor for tensor in inputs if tensor is not None and tensor.is_floating_point())
        )
        return RowResult(total=total, denominator=torch.ones(()), metrics={})


class _MadeUpGradients(torch.autograd.Function):
    """One node with gradients formed in forward and scaled in backward, as the row engine's; without numbers."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*(torch.empty_like(tensor) for tensor in inputs if tensor.requires_grad))
        return inputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradients = iter(ctx.saved_tensors)
        return tuple(next(gradients) * incoming if needed else None for needed in ctx.needs_input_grad)
