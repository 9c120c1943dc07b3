"""Which checkpoint training goes on from: the newest that is as it was written. Damaged ones after it are set aside.

The first rank tries them, the others follow it. A damaged one is renamed, never removed, because something of it may be
wanted. Where no sound one is left, it is an error: training from the first step again is the user's choice. Knows
checkpoints and ranks. Does not know training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.errors import CheckpointError
from deepspec_core.training import checkpoint as checkpoints
from deepspec_core.training.checkpoint import DamagedCheckpoint
from deepspec_core.training.reduction import gathered

log = logging.getLogger("deepspec")

_ASIDE: Final = "damaged-"


@frozen(kw_only=True)
class Resumed:
    """checkpoint: What was restored. scalars: What it says beside tensors. damaged: Newer ones that are set aside."""

    checkpoint: Path
    scalars: dict[str, Any]
    damaged: int


def resume(
    folder: Path, *, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, first: bool
) -> Resumed | None:
    """Restore the newest sound checkpoint of a training folder; None where there is no checkpoint.

    All ranks must call it together. CheckpointError where all are damaged, or one is of another draft.
    """
    if not first:
        (name, damaged), *_ = gathered(None)
        if name is None:
            return None
        checkpoint = folder / checkpoints.CHECKPOINTS / name
        scalars = checkpoints.restore(checkpoint, parameters=parameters, optimizer=optimizer)
        return Resumed(checkpoint=checkpoint, scalars=scalars, damaged=damaged)
    found = _newest_sound(folder, parameters, optimizer)
    gathered((None, 0) if found is None else (found.checkpoint.name, found.damaged))
    return found


def _newest_sound(folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Resumed | None:
    damaged: list[tuple[Path, DamagedCheckpoint]] = []
    for checkpoint in reversed(checkpoints.complete(folder)):
        try:
            scalars = checkpoints.restore(checkpoint, parameters=parameters, optimizer=optimizer)
        except DamagedCheckpoint as error:
            damaged.append((checkpoint, error))
            continue
        for path, damage in damaged:
            _set_aside(path, damage, checkpoint)
        return Resumed(checkpoint=checkpoint, scalars=scalars, damaged=len(damaged))
    if damaged:
        path, first = damaged[0]
        raise CheckpointError(
            "damaged training state, and no earlier checkpoint to go on from",
            where=first.where,
            found=first.found,
            expected=first.expected,
            fix=f"remove {path.parent} to train anew from the first step, or train in another output folder",
        ) from first
    return None


def _set_aside(path: Path, error: DamagedCheckpoint, instead: Path) -> None:
    aside, number = path.with_name(f"{_ASIDE}{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{_ASIDE}{path.name}-{number}")
    path.rename(aside)
    log.warning(
        "checkpoint %s is damaged (%s: %s): training goes on from step %d, and %d steps are done again; "
        "the damaged one is kept as %s",
        path.name,
        error.where,
        error.found,
        checkpoints.step_of(instead),
        checkpoints.step_of(path) - checkpoints.step_of(instead),
        aside,
    )
