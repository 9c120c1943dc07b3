"""Micro-batches on the host, in order. Samples are read, prepared and collated in this process or in workers.

Knows plans, sources, rows and preparations. Does not know devices, features of an online target, or optimizers.
"""

from __future__ import annotations

import faulthandler
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

from deepspec_core.contracts.draft import Preparation
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.errors import TrainingError
from deepspec_core.plugins.exits import no_exit
from deepspec_core.stopping import StopRequest
from deepspec_core.training.ahead import batches_ahead
from deepspec_core.training.host_batch import HostBatch, host_batch
from deepspec_core.training.plans import Plan as Plan
from deepspec_core.training.plans import StepPlans as StepPlans
from deepspec_core.training.sampler import sample_rng

_READ_AHEAD = 4  # micro-batches of each worker
_DEAD = re.compile(r"DataLoader worker \(pid")  # how PyTorch's message of one begins


class MicroBatches(Dataset[HostBatch]):
    """Makes micro-batches from plans. This is the work of a loader worker."""

    def __init__(self, source: FeatureSource, preparation: Preparation, seed: int) -> None:
        self.source, self.preparation, self.seed = source, preparation, seed

    def __getitem__(self, plan: Plan) -> HostBatch:
        with no_exit():  # a worker that ends has no message
            return self._made(plan)

    def _made(self, plan: Plan) -> HostBatch:
        samples = [self.source[index] for index in plan.indices]
        rngs = [sample_rng(self.seed, plan.epoch, sample.id) for sample in samples]
        prepared = [self.preparation.prepare(sample, rng) for sample, rng in zip(samples, rngs, strict=True)]
        return host_batch(prepared, self.preparation, row_sizes=plan.row_sizes)


def iterate(
    source: FeatureSource,
    preparation: Preparation,
    plans: StepPlans,
    *,
    seed: int,
    workers: int,
    pinned: bool = False,
    request: StopRequest | None = None,
) -> Iterator[HostBatch]:
    """The micro-batches of the plans, in order. `workers` processes read ahead; with 0, this process reads.

    A source with `in_order` reads ahead by itself, in this process, and no worker is started. It may take long, so the
    iterator raises ahead.NothingCame if no micro-batch comes after a `request` to stop.

    `pinned`: in memory from which a device copies while the host goes on; with workers, a thread copies them there.
    """
    if hasattr(source, "in_order"):
        return batches_ahead(source, preparation, plans, seed=seed, pinned=pinned, request=request)
    dataset = MicroBatches(source, preparation, seed)
    if workers == 0:
        made = map(dataset.__getitem__, plans)
        return map(HostBatch.pin_memory, made) if pinned else made
    options: dict[str, Any] = {
        "num_workers": workers,
        "prefetch_factor": _READ_AHEAD,
        "pin_memory": pinned,
        "worker_init_fn": _begin_worker,
    }
    return iter(DataLoader(dataset, batch_size=None, sampler=plans, collate_fn=_as_is, **options))


@contextmanager
def dead_worker_is_an_error() -> Iterator[None]:
    """Raise TrainingError if a loader worker ends inside the block. PyTorch notices it wherever the main thread is."""
    try:
        yield
    except RuntimeError as error:
        if not _DEAD.match(str(error)):
            raise
        # If a worker dies while a batch is awaited, PyTorch reports it twice. Only the first report says how it ended.
        told = str(error.__cause__) if _DEAD.match(str(error.__cause__)) else str(error)
        raise TrainingError(
            "a loader worker ended unexpectedly",
            found=told.splitlines()[0].strip(),
            expected="loader workers that run until training ends",
            fix="Memory may have run out: lower train.loader_workers. Run again: training resumes "
            "from the last checkpoint.",
        ) from error


def _as_is(batch: Any) -> Any:
    return batch


def _begin_worker(_worker: int) -> None:
    faulthandler.enable(2)  # a bus error then says where it was
    # Ctrl-C reaches every process of the terminal, and a launcher's SIGTERM every process of the group. The training
    # process finishes its step first and then ends its loaders. It sends a second SIGTERM to one that hangs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))
