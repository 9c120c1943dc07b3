"""The training loop: optimizer steps over a source of samples, with checkpoints, resumption and figures.

Knows sources, drafts, engines and optimizers through their contracts. Does not know stages, folders other than its own,
algorithms or families. accelerate handles devices and data parallelism, step.py precision, reduction.py the division.
"""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from attrs import field, frozen
from torch import Tensor

from deepspec_core.config.schema import PACKED, LossOptions, TrainOptions
from deepspec_core.contracts.draft import DraftModel, Preparation
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.dtypes import torch_dtype
from deepspec_core.errors import CheckpointError, DataError, TrainingError
from deepspec_core.plugins.registry import Registry
from deepspec_core.progress import Progress
from deepspec_core.rows.engine import build_engine
from deepspec_core.stopping import Stopped, StopRequest
from deepspec_core.training import checkpoint as checkpoints
from deepspec_core.training.epoch_order import ORDERS
from deepspec_core.training.host_batch import HostBatch
from deepspec_core.training.loader import StepPlans, iterate
from deepspec_core.training.metrics import Clock, Figures, MetricsLog
from deepspec_core.training.on_policy import Rollouts, Unprepared, rolls_out
from deepspec_core.training.packed_check import check_draft_apart
from deepspec_core.training.reduction import StepSums, gathered, normalise
from deepspec_core.training.sampler import GlobalBatches
from deepspec_core.training.schedule import learning_rate
from deepspec_core.training.step import TrainingStep

METRICS = "metrics.jsonl"
_SHOWN_IDS = 8
_FIXED_SCALARS = ("seed", "samples", "global_batch_size")
_KEPT = {**dict.fromkeys(_FIXED_SCALARS, int), "figures": dict, "counts": dict}


@frozen(kw_only=True)
class TrainResult:
    """What training came to.

    checkpoint: The newest checkpoint, a directory with `draft/`.
    resumed_from: The step of the checkpoint that training went on from, or 0.
    figures: The last line of metrics.jsonl. On ranks other than the first, the last line of this call.
    counts: What preparation counted, over all epochs and ranks.
    unfinished: The number of half-written checkpoints that were removed at the start.
    """

    checkpoint: Path
    steps: int
    resumed_from: int
    figures: dict[str, Any] = field(factory=dict)
    counts: dict[str, int] = field(factory=dict)
    unfinished: int = 0
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
    device: str | torch.device | None = None,
) -> TrainResult:
    """Train `draft` in place for the steps that `options` ask for, from the newest checkpoint of `folder` on.

    It writes `folder`/checkpoints and `folder`/metrics.jsonl. `save_draft(path)` writes the draft as published, and
    `on_checkpoint(path)` is called with each complete checkpoint; both on the first rank only. The schedule spans
    min(max_steps, steps of all epochs). Ctrl-C or SIGTERM finishes the step, saves a checkpoint and raises Stopped. A
    second one stops at once.

    DataError if there are no samples. CheckpointError if a training state is damaged or of another run, or if there is
    no room for one. TrainingError if a loss or gradient is not finite, before weights are changed, or if no row of an
    epoch is supervised.
    """
    if len(source) == 0:
        raise DataError(
            "no samples to train on",
            expected="at least one conversation that passes [data]'s filters",
            fix="lower data.min_supervised_tokens, raise data.max_length, or add sources",
        )
    start = time.monotonic()
    trainer = _Trainer(draft, source, options, loss, registry, folder, seed, save_draft, on_checkpoint, device)
    figures = trainer.run()
    return TrainResult(
        checkpoint=trainer.checkpoint,
        steps=trainer.total_steps,
        resumed_from=trainer.first_step,
        figures=figures,
        counts=trainer.all_counts(),
        unfinished=trainer.unfinished,
        seconds=time.monotonic() - start,
    )


class _Trainer:
    checkpoint: Path

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
        device: str | torch.device | None,
    ) -> None:
        self.source, self.options, self.folder, self.seed = source, options, folder, seed
        self.preparation: Preparation = Unprepared() if rolls_out(draft) else draft.preparation
        self.save_draft, self.on_checkpoint = save_draft, on_checkpoint
        self.accelerator = Accelerator(
            cpu=device is not None and torch.device(device).type == "cpu",
            mixed_precision="no",
            # A draft's buffers are constants, so they need not be broadcast in every forward pass.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        self.batches = GlobalBatches(
            list(source.lengths()),
            global_batch_size=options.global_batch_size,
            epochs=options.epochs,
            seed=seed,
            order=ORDERS[options.batching],
        )
        self.row_tokens = max(self.batches.lengths) if options.batching == PACKED else None
        self.total_steps = min(self.batches.total_steps, options.max_steps or self.batches.total_steps)
        self.model = self._wrap(draft, loss, registry)
        if self.row_tokens is not None:
            check_draft_apart(draft, device=self.device, compute_dtype=torch_dtype(options.precision))
        self.rollouts: Rollouts | None = None
        if rolls_out(draft):
            dtype = torch_dtype(options.precision)
            self.rollouts = Rollouts(draft, source, seed=seed, device=self.device, compute_dtype=dtype)
        self.parameters = {name: value for name, value in draft.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=options.lr,
            betas=options.betas,
            eps=1e-8,
            weight_decay=options.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.accelerator.unwrap_model(self.model).weights.follow(self.optimizer)
        self.loss_names = ["loss", *(f"loss/{name}" for name in loss.terms)]
        self.figures = Figures()
        self.counts: Counter[str] = Counter()  # of this rank, since the start of this call
        self.counts_before: Counter[str] = Counter()  # of all ranks, up to the checkpoint resumed from
        self.epoch_weight = 0.0  # the denominators of this epoch's steps so far, all ranks
        self.checkpoint_bytes = checkpoints.bytes_of_one(draft)
        self.unfinished = checkpoints.remove_unfinished(folder) if self.is_main else 0
        self.first_step = self._resume()

    def _wrap(self, draft: DraftModel, loss: LossOptions, registry: Registry) -> torch.nn.Module:
        compute_dtype = torch_dtype(self.options.precision)
        for parameter in draft.parameters():
            # Trained weights are fp32, whatever the dtype of their checkpoint. Frozen weights keep their dtype.
            if parameter.requires_grad or compute_dtype == torch.float32:
                parameter.data = parameter.data.to(torch.float32)
        step = TrainingStep(
            draft.train(),
            build_engine(loss, registry),
            compute_dtype=compute_dtype,
            alone=self.accelerator.num_processes == 1,
        )
        wrapped: torch.nn.Module = self.accelerator.prepare_model(step)
        return wrapped

    def _resume(self) -> int:
        newest = checkpoints.latest(self.folder)
        if newest is None:
            return 0
        scalars = checkpoints.restore(newest, parameters=self.parameters, optimizer=self.optimizer)
        for name, type_ in _KEPT.items():
            if type(scalars.get(name)) is not type_:
                raise CheckpointError(
                    "damaged training state",
                    where=f"{newest}: {name}",
                    found=repr(scalars.get(name))[:80],
                    fix=f"remove {newest} to resume from the checkpoint before it",
                )
        for name, value in self._scalars(0).items():
            if name in _FIXED_SCALARS and scalars[name] != value:
                raise CheckpointError(
                    f"training cannot resume: {name} is not what the checkpoint was trained with",
                    where=newest,
                    found=f"{name} = {value}",
                    expected=f"{name} = {scalars[name]}",
                    fix="set it back, or train in another output folder",
                )
        self.figures = Figures(scalars["figures"])
        self.counts_before = Counter(scalars["counts"])
        # Older checkpoints do not say it; they are assumed to have seen supervised rows.
        self.epoch_weight = scalars.get("epoch_weight", 1.0)
        self.checkpoint = newest
        return checkpoints.step_of(newest)

    def run(self) -> dict[str, Any]:
        """Do every step that is left. Returns the last line of figures."""
        log = MetricsLog(self.folder / METRICS, resume_at=self.first_step) if self.is_main else None
        line = log.last() if log is not None else {}
        if self.first_step >= self.total_steps:
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
        micro_batches = iterate(
            self.source, self.preparation, plans, seed=self.seed, workers=self.options.loader_workers
        )
        progress = Progress(self.total_steps, "train", "steps", done=self.first_step, enabled=self.is_main)
        clock = Clock()
        with StopRequest() as request, progress:
            for step in range(self.first_step, self.total_steps):
                done = step + 1
                last = done == self.total_steps
                logged = last or done % self.options.log_every == 0
                rate, norm, stop = self._step(step, plans, micro_batches, logged, request.asked)
                chosen = self.batches.indices(step)
                clock.count(len(chosen), sum(self.batches.lengths[index] for index in chosen))
                if logged:
                    epochs = round(done / self.batches.steps_per_epoch, 4)
                    line = {"step": done, "epoch": epochs, "lr": rate, "grad_norm": norm}
                    line |= {**clock.rates(), **self.figures.take()}
                    if log is not None:
                        log.write(line)
                shown = {name: line[name] for name in ("loss", "tau_probabilistic") if name in line}
                progress.advance(1, **shown)
                epoch = self.batches.epoch(step)
                if self.batches.epoch(done) != epoch or (last and epoch == 0):
                    self._require_supervision()
                if stop or last or done % self.options.checkpoint_every == 0:
                    self._save(done)
                if stop:
                    raise Stopped(request.number or signal.SIGTERM)  # another rank's signal, where not ours
        return line

    def _step(
        self, step: int, plans: StepPlans, micro_batches: Iterator[HostBatch], with_metrics: bool, interrupted: bool
    ) -> tuple[float, float, bool]:
        """Do one optimizer step.

        Returns its learning rate, its gradient norm before clipping, and whether a rank stops.
        """
        sums = StepSums(self.device)
        done: list[tuple[list[str], Tensor]] = []
        share = plans.of_step(step)
        for number, plan in enumerate(share):
            micro = next(micro_batches)
            if self.rollouts is not None:
                micro = self.rollouts(micro, plan.epoch)
            batch = micro.to_draft_batch(self.source, self.device)
            waits = number + 1 < len(share)
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                result = self.model(batch, step=step, with_metrics=with_metrics)
                (result.total if plan.live else result.total * 0.0).backward()
            if plan.live:
                sums.add(result.denominator, result.metrics)
                self.counts.update(micro.counts)
                self.counts["positions"] += micro.attention_mask.numel()
                self.counts["padding"] += int((~micro.attention_mask).sum())
            done.append(([sample.id for sample in micro.samples], result.total.detach()))
        names = _union(gathered(list(sums.ratios))) if with_metrics else self.loss_names
        vector = sums.reduce(names, interrupted)
        norm = normalise(
            list(self.parameters.values()),
            vector[0],
            world_size=self.accelerator.num_processes,
            clip_norm=self.options.clip_norm,
        )
        # Here, and only here, a step waits for the device.
        grad_norm, denominator, stop, *values = torch.cat((norm.to(vector.dtype).reshape(1), vector)).tolist()
        if not (math.isfinite(grad_norm) and math.isfinite(denominator) and all(map(math.isfinite, values))):
            raise self._not_finite(step, grad_norm, done)
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
            counts = self.all_counts()
            raise TrainingError(
                "the draft has nothing to learn from: no row of an epoch is supervised",
                where=f"{len(self.batches.lengths)} samples",
                found=", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count) or None,
                expected="samples with supervised tokens that the draft can predict",
                fix="Raise data.max_length or data.min_supervised_tokens, or give longer answers.",
            )
        self.epoch_weight = 0.0

    def _not_finite(self, step: int, grad_norm: float, done: list[tuple[list[str], Tensor]]) -> TrainingError:
        culprits = [ids for ids, total in done if not bool(torch.isfinite(total))]
        ids = [name for names in culprits or [names for names, _ in done] for name in names]
        more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        what = "loss" if culprits else "gradient"
        return TrainingError(
            f"the {what} of step {step + 1} is not finite; weights were left as they were after step {step}",
            where=f"samples {', '.join(ids[:_SHOWN_IDS])}{more}",
            found=f"gradient norm {grad_norm}",
            fix="look at these samples and their features; lower train.lr or train.clip_norm where they are sound",
        )

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
            )
            if self.on_checkpoint is not None:
                self.on_checkpoint(self.checkpoint)
        self.accelerator.wait_for_everyone()
        self.checkpoint = self.folder / checkpoints.CHECKPOINTS / f"step-{step:06d}"


def _union(parts: list[list[str]]) -> list[str]:
    """The names that any rank has, in one order, because a rank may have seen fewer slots than another."""
    return list(dict.fromkeys(name for part in parts for name in part))
