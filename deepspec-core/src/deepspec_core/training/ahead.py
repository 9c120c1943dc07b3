"""Micro-batches of a source that reads ahead by itself, prepared in a thread of this process.

Such a source has `in_order(indices)`: it keeps many requests in flight along the whole order of training. Loader
workers could not do this, because each sees only a few micro-batches. The thread prepares and collates while the
training process computes. Knows plans, sources and preparations; does not know where features come from.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

from deepspec_core.contracts.draft import Preparation, Sample
from deepspec_core.stopping import StopRequest
from deepspec_core.training.host_batch import HostBatch, host_batch
from deepspec_core.training.plans import StepPlans
from deepspec_core.training.sampler import sample_rng

_READY = 2  # micro-batches that wait for the training process
_LOOK_SECONDS = 0.5


class NothingCame(Exception):
    """Training was asked to stop while it waited for a micro-batch. The source may take long, or never give it."""


def batches_ahead(
    source: Any,
    preparation: Preparation,
    plans: StepPlans,
    *,
    seed: int,
    pinned: bool,
    request: StopRequest | None,
) -> Iterator[HostBatch]:
    """The micro-batches of the plans, in order. Closing the iterator ends the thread and the source's requests.

    Raises NothingCame if no micro-batch comes after a `request` to stop.
    """
    ready: queue.Queue[HostBatch | BaseException | None] = queue.Queue(_READY)
    closed = threading.Event()

    def put(item: HostBatch | BaseException | None) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def awaited() -> HostBatch | BaseException | None:
        while True:
            try:
                return ready.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if request is not None and request.asked:
                    raise NothingCame from None

    def made(samples: Iterator[Sample]) -> Iterator[HostBatch]:
        for plan in plans:
            chosen = list(islice(samples, len(plan.indices)))
            if len(chosen) < len(plan.indices):
                return  # closed
            rngs = [sample_rng(seed, plan.epoch, sample.id) for sample in chosen]
            prepared = [preparation.prepare(sample, rng) for sample, rng in zip(chosen, rngs, strict=True)]
            batch = host_batch(prepared, preparation, row_sizes=plan.row_sizes)
            yield batch.pin_memory() if pinned else batch

    def work() -> None:
        try:
            for batch in made(iter(samples)):
                put(batch)
            put(None)
        except BaseException as error:  # told to the training process
            put(error)

    samples = source.in_order(index for plan in plans for index in plan.indices)
    thread = threading.Thread(target=work, name="micro-batches ahead", daemon=True)
    thread.start()
    try:
        while (item := awaited()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        samples.close()  # ends every wait for a sample
        thread.join()
