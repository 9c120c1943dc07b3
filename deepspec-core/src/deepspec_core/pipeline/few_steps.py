"""Warns if training takes so few steps that the draft cannot have learned anything.

The rule: fewer than FEWEST optimizer steps. Published drafts take tens of thousands. After less than a few hundred, the
loss still falls steeply, and the accepted length says nothing about the algorithm, the target or the data. A smoke run
gets no warning. The warning comes before the first stage if the run file determines the number of steps, else when the
samples have been counted.
"""

from __future__ import annotations

import logging
from typing import Final

from deepspec_core.config.schema import TrainOptions
from deepspec_core.pipeline import workers
from deepspec_core.pipeline.run import Run

log = logging.getLogger("deepspec")

FEWEST: Final = 300


def steps_of(options: TrainOptions, samples: int | None) -> tuple[int | None, int | None]:
    """(steps of training, steps of one epoch) for a number of samples; None for steps that are not known.

    If the number of samples is not known, max_steps is the upper bound of the first.
    """
    if samples is None:
        return options.max_steps, None
    epoch = -(-samples // options.global_batch_size)
    steps = epoch * options.epochs
    return min(steps, options.max_steps or steps), epoch


def warn_before(run: Run) -> None:
    """Before the first stage: by max_steps, and by the sources' limits where all have one."""
    if not run.smoke:
        _warn(run.file.train, run.data.expected_conversations(), "at most ")


def warn_exactly(run: Run, samples: int) -> None:
    """Warn once the samples are counted, unless max_steps led to the warning before the first stage."""
    said = run.file.train.max_steps is not None and run.file.train.max_steps < FEWEST
    if not run.smoke and not said:
        _warn(run.file.train, samples, "")


def _warn(options: TrainOptions, samples: int | None, most: str) -> None:
    steps, epoch = steps_of(options, samples)
    if steps is None or steps >= FEWEST or workers.rank() > 0:
        return
    share = f", {100 * steps / epoch:.0f}% of an epoch" if epoch and steps < epoch else ""
    log.warning(
        "training takes %s%d optimizer steps%s: with fewer than %d, its figures mean little. Raise "
        "train.epochs or train.max_steps, or lower train.global_batch_size (%d)",
        most, steps, share, FEWEST, options.global_batch_size,
    )  # fmt: skip
