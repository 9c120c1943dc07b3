"""The training loop: optimizer steps over a source of samples, with checkpoints, resumption and figures.

Knows sources, drafts, engines and optimizers through their contracts. Does not know stages, folders other than its own,
algorithms or families. accelerate finds devices and ranks, parallel.py distributes the draft, step.py sets the
precision, reduction.py divides the sums.
"""

from __future__ import annotations

import math
import signal
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from attrs import field, frozen
from torch import Tensor

from deepspec_core.config.schema import PACKED, LossOptions, TrainOptions
from deepspec_core.config.train_options import MUON
from deepspec_core.contracts.draft import DraftModel, Preparation
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.dtypes import torch_dtype
from deepspec_core.errors import DataError
from deepspec_core.plugins.registry import Registry
from deepspec_core.progress import Progress
from deepspec_core.rows.engine import build_engine
from deepspec_core.stopping import Stopped, StopRequest
from deepspec_core.training import checkpoint as checkpoints
from deepspec_core.training.ahead import NothingCame
from deepspec_core.training.best_checkpoints import Evaluations
from deepspec_core.training.epoch_order import ORDERS
from deepspec_core.training.fallback import resume
from deepspec_core.training.faults import not_finite, nothing_supervised
from deepspec_core.training.host_batch import HostBatch
from deepspec_core.training.loader import StepPlans, dead_worker_is_an_error, iterate
from deepspec_core.training.metrics import Clock, Figures, MetricsLog, at_a_glance
from deepspec_core.training.metrics_lines import METRICS
from deepspec_core.training.on_policy import Rollouts, Unprepared, rolls_out
from deepspec_core.training.optimizers import build_optimizer, hidden_matrices
from deepspec_core.training.pace import Pace
from deepspec_core.training.packed_check import check_draft_apart
from deepspec_core.training.parallel import Parallel, parallelise
from deepspec_core.training.reduction import StepSums, gathered, normalise, union
from deepspec_core.training.sampler import GlobalBatches
from deepspec_core.training.schedule import learning_rate
from deepspec_core.training.step import TrainingStep
from deepspec_core.training.stored_scalars import check_scalars


@frozen(kw_only=True)
class TrainResult:
    """The result of training.

    checkpoint: The newest checkpoint, a directory with `draft/`.
    resumed_from: The step of the checkpoint that training went on from, or 0.
    figures: The last line of metrics.jsonl. On ranks other than the first, the last line of this call.
    counts: What preparation counted, over all epochs and ranks.
    unfinished: The number of half-written checkpoints that were removed at the start.
    damaged: The number of damaged checkpoints that were set aside at the start.
    """

    checkpoint: Path
    steps: int
    resumed_from: int
    figures: dict[str, Any] = field(factory=dict)
    counts: dict[str, int] = field(factory=dict)
    unfinished: int = 0
    damaged: int = 0
    seconds: float = 0.0


def train(
    *,
    draft: DraftModel,
    source: FeatureSource,
    options: TrainOptions,
    loss: LossOptions,
    registry: Registry,
    folder: Path,
    seed: int,
    save_draft: Callable[[Path], None],
    on_checkpoint: Callable[[Path], None] | None = None,
    on_line: Callable[[], None] | None = None,
    device: str | torch.device | None = None,
    evaluations: Evaluations | None = None,
) -> TrainResult:
    """Train `draft` in place for the steps that `options` ask for, from the newest checkpoint of `folder` on.

    It writes `folder`/checkpoints and `folder`/metrics.jsonl. `save_draft(path)` writes the draft as published, and
    `on_checkpoint(path)` is called with each complete checkpoint, `on_line()` after each line of metrics.jsonl; all on
    the first rank only. The schedule spans min(max_steps, steps of all epochs). `evaluations` evaluate checkpoints, and
    may end training early. Ctrl-C or SIGTERM finishes the step, saves a checkpoint and raises Stopped. A single process
    that waits for a source that reads ahead does so without that step. A second signal stops at once.

    Raises DataError if there are no samples. Raises CheckpointError if a training state is damaged or of another run,
    or if there is no room for one. Raises TrainingError if a loss or gradient is not finite, before weights are
    changed, or if no row of an epoch is supervised.
    """
    if len(source) == 0:
        raise DataError(
            "there are no samples to train on",
            expected="at least one conversation that passes [data]'s filters",
            fix="lower data.min_supervised_tokens, raise data.max_length, or add sources",
        )
    start = time.monotonic()
    trainer = _Trainer(draft, source, options, loss, registry, folder, seed, save_draft, on_checkpoint, on_line, device)
    trainer.evaluations = evaluations or Evaluations(options)
    figures = trainer.run()
    return TrainResult(
        checkpoint=trainer.checkpoint,
        steps=checkpoints.step_of(trainer.checkpoint),
        resumed_from=trainer.first_step,
        figures=figures,
        counts=trainer.all_counts(),
        unfinished=trainer.unfinished,
        damaged=trainer.damaged,
        seconds=time.monotonic() - start,
    )


class _Trainer:
    checkpoint: Path
    evaluations: Evaluations

    def __init__(
        self,
        draft: DraftModel,
        source: FeatureSource,
        options: TrainOptions,
        loss: LossOptions,
        registry: Registry,
        folder: Path,
        seed: int,
        save_draft: Callable[[Path], None],
        on_checkpoint: Callable[[Path], None] | None,
        on_line: Callable[[], None] | None,
        device: str | torch.device | None,
    ) -> None:
        self.source, self.options, self.folder, self.seed = source, options, folder, seed
        self.preparation: Preparation = Unprepared() if rolls_out(draft) else draft.preparation
        self.save_draft, self.on_checkpoint, self.on_line = save_draft, on_checkpoint, on_line
        self.accelerator = Accelerator(
            cpu=device is not None and torch.device(device).type == "cpu",
            mixed_precision="no",
        )
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        self.batches = GlobalBatches(
            array("i", source.lengths()),
            global_batch_size=options.global_batch_size,
            epochs=options.epochs,
            seed=seed,
            order=ORDERS[options.batching],
        )
        self.row_tokens = max(self.batches.lengths) if options.batching == PACKED else None
        self.total_steps = min(self.batches.total_steps, options.max_steps or self.batches.total_steps)
        step = self._step_of(draft, loss, registry)
        matrices = hidden_matrices(draft) if options.optimizer == MUON else frozenset()
        processes = self.accelerator.num_processes
        self.parallel: Parallel = parallelise(step, options.parallel, device=self.device, processes=processes)
        if self.row_tokens is not None:
            with self.parallel.whole_draft():
                check_draft_apart(draft, device=self.device, compute_dtype=torch_dtype(options.precision))
        self.rollouts: Rollouts | None = None
        if rolls_out(draft):
            dtype = torch_dtype(options.precision)
            self.rollouts = Rollouts(draft, source, seed=seed, device=self.device, compute_dtype=dtype)
        self.parameters = {name: value for name, value in draft.named_parameters() if value.requires_grad}
        self.optimizer = build_optimizer(
            self.parameters, options, matrices=matrices, fused=self.device.type in ("cpu", "cuda")
        )
        step.weights.follow(self.optimizer)
        self.pace = Pace(self.device)
        self.loss_names = ["loss", *(f"loss/{name}" for name in loss.terms), "padding_share"]
        self.figures = Figures()
        self.counts: Counter[str] = Counter()  # of this rank, since the start of this call
        self.counts_before: Counter[str] = Counter()  # of all ranks, up to the checkpoint resumed from
        self.epoch_weight = 0.0  # the denominators of this epoch's steps so far, all ranks
        self.checkpoint_bytes = checkpoints.bytes_of_one(draft)
        self.unfinished = checkpoints.remove_unfinished(folder) if self.is_main else 0
        self.damaged = 0
        self.first_step = self.saved = self._resume()

    def _step_of(self, draft: DraftModel, loss: LossOptions, registry: Registry) -> TrainingStep:
        compute_dtype = torch_dtype(self.options.precision)
        for parameter in draft.parameters():
            # Trained weights are fp32, whatever the dtype of their checkpoint. Frozen weights keep their dtype.
            if parameter.requires_grad or compute_dtype == torch.float32:
                parameter.data = parameter.data.to(torch.float32)
        engine, alone = build_engine(loss, registry), self.accelerator.num_processes == 1
        return TrainingStep(draft.train(), engine, compute_dtype=compute_dtype, alone=alone, checks=True)

    def _resume(self) -> int:
        found = resume(self.folder, parameters=self.parameters, optimizer=self.optimizer, first=self.is_main)
        if found is None:
            return 0
        newest, scalars, self.damaged = found.checkpoint, found.scalars, found.damaged
        check_scalars(scalars, self._scalars(0), newest)
        self.figures = Figures(scalars["figures"])
        self.counts_before = Counter(scalars["counts"])
        # Older checkpoints do not say it; they are assumed to have seen supervised rows.
        self.epoch_weight = scalars.get("epoch_weight", 1.0)
        self.checkpoint = newest
        return checkpoints.step_of(newest)

    def run(self) -> dict[str, Any]:
        """Do every step that is left. Returns the last line of figures."""
        lines = MetricsLog(self.folder / METRICS, resume_at=self.first_step) if self.is_main else None
        self.evaluations.begin(
            self.folder,
            lines,
            self._save,
            done=self.first_step,
            total=self.total_steps,
            epoch=self.batches.steps_per_epoch,
        )
        line = lines.last() if lines is not None else {}
        if self.first_step >= self.total_steps or self.evaluations.over():
            # A killed process may owe lines, and `begin` may have added figures. Where steps are left, their first line
            # tells it: nothing may start a thread before loader workers are forked.
            self._lines_changed()
            return line
        checkpoints.require_space(self.folder, self.checkpoint_bytes)
        plans = StepPlans(
            self.batches,
            range(self.first_step, self.total_steps),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            micro_batch_size=self.options.micro_batch_size,
            row_tokens=self.row_tokens,
        )
        pinned, workers = self.device.type == "cuda", self.options.loader_workers
        # Ranks end after the same step. One that waits alone cannot know which step the others are in.
        request = StopRequest()
        asked = request if self.accelerator.num_processes == 1 else None
        loader = iterate(
            self.source, self.preparation, plans, seed=self.seed, workers=workers, pinned=pinned, request=asked
        )
        progress = Progress(self.total_steps, "train", "steps", done=self.first_step, enabled=self.is_main)
        clock = Clock()
        micro_batches = clock.waiting(loader)
        with request, progress, dead_worker_is_an_error():
            for step in range(self.first_step, self.total_steps):
                done = step + 1
                last = done == self.total_steps
                due = self.evaluations.due(done)
                logged = last or due or done % self.options.log_every == 0
                counts = Counter(self.counts)
                try:
                    rate, norm, stop = self._step(step, plans, micro_batches, logged, request.asked)
                except NothingCame:
                    self.counts = counts  # the step is done again
                    if step > self.saved:
                        self._save(step)
                    raise Stopped(request.number or signal.SIGTERM) from None
                chosen = self.batches.indices(step)
                clock.count(len(chosen), sum(self.batches.lengths[index] for index in chosen))
                if logged:
                    epochs = round(done / self.batches.steps_per_epoch, 4)
                    line = {"step": done, "epoch": epochs, "lr": rate, "grad_norm": norm}
                    line |= {**clock.rates(), **self.pace.figures(), **self._of_source(), **self.figures.take()}
                    if lines is not None:
                        lines.write(line)
                        self._lines_changed()
                progress.advance(1, **at_a_glance(line))
                epoch = self.batches.epoch(step)
                if self.batches.epoch(done) != epoch or (last and epoch == 0):
                    self._require_supervision()
                if stop or last or due or done % self.options.checkpoint_every == 0:
                    self._save(done)
                if stop:
                    raise Stopped(request.number or signal.SIGTERM)  # another rank's signal, where not ours
                if due:
                    line |= self.evaluations.evaluate(done, request.check)
                    self._lines_changed()
                    clock.restart()
                    self.pace.restart()
                    if self.evaluations.over():
                        break
        return line

    def _of_source(self) -> dict[str, float]:
        """The figures of a source that has some, summed over all ranks. All ranks must call it together."""
        own = getattr(self.source, "figures", None)
        parts = [] if own is None else gathered(dict(own()))
        return {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}

    def _lines_changed(self) -> None:
        if self.is_main and self.on_line is not None:
            self.on_line()

    def _step(
        self, step: int, plans: StepPlans, micro_batches: Iterator[HostBatch], with_metrics: bool, interrupted: bool
    ) -> tuple[float, float, bool]:
        """Do one optimizer step.

        Returns its learning rate, its gradient norm before clipping, and whether a rank stops.
        """
        sums = StepSums(self.device)
        done: list[tuple[list[str], Tensor]] = []
        self.pace.begin()
        share = plans.of_step(step)
        self.parallel.begin_step()
        for number, plan in enumerate(share):
            micro = next(micro_batches)
            if self.rollouts is not None:
                micro = self.rollouts(micro, plan.epoch)
            batch = micro.to_draft_batch(self.source, self.device)
            last = number + 1 == len(share)
            with self.parallel.micro_batch(last=last):
                result = self.parallel.module(batch, step=step, with_metrics=with_metrics)
                if last:
                    self.pace.exchange()
                (result.total if plan.live else result.total * 0.0).backward()
            if plan.live:
                sums.add(result.denominator, result.metrics)
                self.counts.update(micro.counts)
                positions, padding = micro.attention_mask.numel(), int((~micro.attention_mask).sum())
                self.counts.update(positions=positions, padding=padding)
                sums.add_counts("padding_share", padding, positions)
            done.append(([sample.id for sample in micro.samples], result.total.detach()))
        names = union(gathered(list(sums.ratios))) if with_metrics else self.loss_names
        vector = sums.reduce(names, interrupted)
        norm = normalise(
            list(self.parameters.values()),
            vector[0],
            world_size=self.accelerator.num_processes,
            clip_norm=self.options.clip_norm,
        )
        # Here, and only here, a step waits for the device.
        grad_norm, denominator, stop, *values = torch.cat((norm.to(vector.dtype).reshape(1), vector)).tolist()
        self.pace.end()
        if not (math.isfinite(grad_norm) and math.isfinite(denominator) and all(map(math.isfinite, values))):
            by_name = {"sum of the weights": denominator, **dict(zip(names, values[::2], strict=True))}
            raise not_finite(step, grad_norm, done, by_name)
        rate = learning_rate(step, peak=self.options.lr, total_steps=self.total_steps, warmup=self.options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.figures.add(names, values)
        self.epoch_weight += denominator
        return rate, grad_norm, stop > 0

    def _require_supervision(self) -> None:
        """At the end of an epoch, TrainingError if none of its rows was supervised."""
        if self.epoch_weight <= 0:
            raise nothing_supervised(len(self.batches.lengths), self.all_counts())
        self.epoch_weight = 0.0

    def _scalars(self, step: int) -> dict[str, Any]:
        return {
            "epoch": self.batches.epoch(step),
            "position": step % self.batches.steps_per_epoch * self.options.global_batch_size,
            # All random numbers follow from the seed, the epoch and the sample's id, so no generator's state has to be
            # kept.
            "seed": self.seed,
            "samples": len(self.batches.lengths),
            "global_batch_size": self.options.global_batch_size,
        }

    def all_counts(self) -> dict[str, int]:
        """What preparation counted since the start of training, over all ranks. All ranks must call it together."""
        return dict(sum(map(Counter, gathered(dict(self.counts))), self.counts_before))

    def _save(self, step: int) -> None:
        counts = self.all_counts()
        with self.parallel.whole_draft():
            if self.is_main:
                checkpoints.require_space(self.folder, self.checkpoint_bytes)
                self.checkpoint = checkpoints.save(
                    self.folder,
                    step,
                    save_draft=self.save_draft,
                    parameters=self.parameters,
                    optimizer=self.optimizer,
                    scalars={
                        **self._scalars(step),
                        "figures": self.figures.sums,
                        "counts": counts,
                        "epoch_weight": self.epoch_weight,
                    },
                    keep=self.options.keep_checkpoints,
                    spare=self.evaluations.spared(),
                )
            else:
                checkpoints.take_part(self.parameters, self.optimizer)
        if self.is_main and self.on_checkpoint is not None:
            self.on_checkpoint(self.checkpoint)
        self.accelerator.wait_for_everyone()
        self.checkpoint, self.saved = checkpoints.of_step(self.folder, step), step
