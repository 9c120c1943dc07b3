"""Data parallelism: where trained weights, gradients and moments are stored, and when ranks exchange them.

There are three modes with one interface. Single: everything on one device. Replicated (DDP): a copy on each device.
Sharded (FSDP2): each device holds a part, and the weights are gathered for the duration of an optimizer step. Ranks may
have different numbers of micro-batches in a step, so all of them exchange exactly twice per step: weights before its
first forward pass, gradients in its last backward pass. Knows modules and ranks. Does not know optimizers, files or the
sums of a step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deepspec_core.config.train_options import AUTO, DDP, FSDP
from deepspec_core.contracts.draft import DraftBatch, DraftModel
from deepspec_core.disk import in_words
from deepspec_core.rows.engine import RowResult
from deepspec_core.training.reduction import filled_gradients, gathered
from deepspec_core.training.shards import is_sharded, whole
from deepspec_core.training.step import TrainingStep

log = logging.getLogger("deepspec")

# The fp32 values that DDP keeps for each trained parameter: the weight, its gradient, two moments, and its entry in the
# buffer in which gradients are sent.
DDP_BYTES: Final = 20
# The memory that is left for activations, the batch and the workspace of products.
_USABLE: Final = 0.8


class Parallel(Protocol):
    """A training step on one of several ranks. Calling `module` is a forward pass."""

    @property
    def module(self) -> nn.Module:
        """What is called."""
        ...

    def begin_step(self) -> None:
        """Before the first micro-batch of an optimizer step, on all ranks: bring the weights here."""
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch. Gradients are exchanged in the last one of a step."""
        ...

    def whole_draft(self) -> AbstractContextManager[None]:
        """Inside the block the draft's weights are whole tensors, to be run or saved; no training step is done there.

        All ranks must enter it together.
        """
        ...


class Alone:
    """One process."""

    def __init__(self, step: TrainingStep) -> None:
        self.module: nn.Module = step

    def begin_step(self) -> None:
        """Nothing."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def whole_draft(self) -> AbstractContextManager[None]:
        """The weights are whole tensors already."""
        return nullcontext()


class _Visit(torch.autograd.Function):
    """The total as it is. Its backward pass also visits `weights`, and adds nothing to their gradients."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *weights: Tensor) -> Tensor:
        ctx.count = len(weights)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], *(None for _ in range(ctx.count))


class _Fill(torch.autograd.Function):
    """The total as it is. At the end of its backward pass, weights of `step` without a gradient get one of zeros."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, step: nn.Module) -> Tensor:
        ctx.step = step
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # Callbacks run in the order in which they were queued, so this one runs before that of FSDP2.
        torch.autograd.Variable._execution_engine.queue_callback(partial(_fill, ctx.step))
        return gradients[0], None


def _fill(step: nn.Module) -> None:
    filled_gradients(_trained(step))


def _filled(total: Tensor, step: nn.Module) -> Tensor:
    after: Tensor = _Fill.apply(total, step)  # type: ignore[no-untyped-call]
    return after


def _visited(total: Tensor, step: nn.Module) -> Tensor:
    after: Tensor = _Visit.apply(total, *_trained(step))  # type: ignore[no-untyped-call]
    return after


def _trained(step: nn.Module) -> list[Tensor]:
    return [value for value in step.parameters() if value.requires_grad]


class _EveryWeight(nn.Module):
    """A step whose backward pass reaches every trained weight, as DDP and FSDP2 expect of all ranks.

    A draft may have weights that the rows of a step, or of one rank, do not read. `reach` is _visited or _filled.
    """

    def __init__(self, step: nn.Module, reach: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.step, self.reach = step, reach

    def forward(self, batch: DraftBatch, **options: Any) -> RowResult:
        result: RowResult = self.step(batch, **options)
        return result._replace(total=self.reach(result.total, self.step))


class Replicated(Alone):
    """A copy of everything on each rank (DDP)."""

    def __init__(self, step: TrainingStep) -> None:
        self.module: DistributedDataParallel = DistributedDataParallel(_EveryWeight(step, _visited))
        # A draft's buffers are constants, so they need not be sent in every forward pass. Set here, because the
        # argument's name depends on the release of torch.
        self.module.broadcast_buffers = False

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients of micro-batches before the last one stay on this rank."""
        return nullcontext() if last else self.module.no_sync()


class Sharded:
    """A part of weights, gradients and moments on each rank (FSDP2). Frozen weights are whole on every rank.

    One unit: some layers' weights are used outside the forward pass of their layer, where hooks of a unit of theirs
    would not run.
    """

    def __init__(self, step: TrainingStep, mesh: DeviceMesh) -> None:
        self._draft = step.draft
        frozen = {value for value in step.parameters() if not value.requires_grad}
        self.module: nn.Module = _EveryWeight(step, _filled)
        self._unit = fully_shard(step, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)

    def begin_step(self) -> None:
        """Gather the weights. They stay until the step's last backward pass."""
        self._unit.unshard()

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients are added up whole, and cut into shards in the last micro-batch."""
        # Resharding between micro-batches would gather again before each one, and ranks with fewer of them would be
        # waited for without end.
        self._unit.set_reshard_after_backward(last)
        self._unit.set_requires_gradient_sync(last)
        yield

    @contextmanager
    def whole_draft(self) -> Iterator[None]:
        """Gathered parameter by parameter, and put back as they were."""
        self._unit.reshard()
        parts = [
            (module, name, value)
            for module in self._draft.modules()
            for name, value in module.named_parameters(recurse=False)
            if is_sharded(value)
        ]
        try:
            for module, name, value in parts:
                module.register_parameter(name, nn.Parameter(whole(value.detach())))
            yield
        finally:
            for module, name, value in parts:
                module.register_parameter(name, value)


def parallelise(step: TrainingStep, wanted: str, *, device: torch.device, processes: int) -> Parallel:
    """Put the step on `device` and its weights where `wanted` ("auto", "ddp" or "fsdp") says, and say what that is."""
    step.to(device)
    if processes == 1:
        return Alone(step)
    how, why = choose(wanted, step.draft, device=device)
    if how == DDP:
        log.info("parallel: ddp, %d processes, each with a copy of the weights (%s)", processes, why)
        return Replicated(step)
    mesh, groups = mesh_of(device, processes)
    spread = f"{groups} groups of {processes // groups}" if groups > 1 else f"{processes} processes"
    log.info("parallel: fsdp, weights, gradients and moments sharded over %s (%s)", spread, why)
    return Sharded(step, mesh)


def choose(wanted: str, draft: DraftModel, *, device: torch.device) -> tuple[str, str]:
    """Whether "ddp" or "fsdp", and the reason. All ranks must call it together, and all get the same."""
    if wanted != AUTO:
        return wanted, "as train.parallel says"
    if device.type == "cpu":
        return DDP, "on a CPU the processes share one memory; train.parallel sets it"
    trained = sum(value.numel() for value in draft.parameters() if value.requires_grad)
    needed = DDP_BYTES * trained
    # Weights that are on the device already, the target's among them, are in what is not free.
    free = min(gathered(_free_bytes(device)))
    return fits(needed, free)


def fits(needed: int, free: int) -> tuple[str, str]:
    """Answer "ddp" where a copy of `needed` bytes leaves room on a device with `free` ones, and give the figures."""
    how = DDP if needed <= _USABLE * free else FSDP
    return how, f"a copy takes {in_words(needed)} and {in_words(free)} are free on a device"


def mesh_of(device: torch.device, processes: int) -> tuple[DeviceMesh, int]:
    """The mesh to shard over, and how many groups hold all shards: one a machine where there are several machines.

    Machines with unlike numbers of processes are one group.
    """
    a_machine = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    alike = all(size == a_machine for size in gathered(a_machine)) and processes % a_machine == 0
    if not alike or a_machine in (1, processes):
        return init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",)), 1
    groups = processes // a_machine
    return init_device_mesh(device.type, (groups, a_machine), mesh_dim_names=("replicate", "shard")), groups


def _free_bytes(device: torch.device) -> int:
    memory: Any = torch.get_device_module(device)
    free, _ = memory.mem_get_info(device)
    return int(free)
