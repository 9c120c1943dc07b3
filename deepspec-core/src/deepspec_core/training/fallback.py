"""Sets damaged checkpoints aside and takes the next older one, for resuming and for the finished draft.

The first rank tries the checkpoints, and the others follow it. A damaged checkpoint is renamed, never removed, because
parts of it may still be useful. If no sound one is left, an error is raised: whether to train again from the first step
is the user's choice. Knows checkpoints and ranks. Does not know training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.errors import CheckpointError
from deepspec_core.training import checkpoint as checkpoints
from deepspec_core.training.checkpoint import DamagedCheckpoint
from deepspec_core.training.reduction import gathered

log = logging.getLogger("deepspec")

_ASIDE: Final = "damaged-"

T = TypeVar("T")
Damaged = tuple[Path, DamagedCheckpoint]


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

    All ranks must call it together. Raises CheckpointError if all are damaged, or one is of another draft.
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
    def restore(checkpoint: Path) -> dict[str, Any]:
        return checkpoints.restore(checkpoint, parameters=parameters, optimizer=optimizer)

    found = first_sound(reversed(checkpoints.complete(folder)), restore)
    if found is None:
        return None
    checkpoint, scalars, damaged = found
    for path, damage in damaged:
        again = checkpoints.step_of(path) - checkpoints.step_of(checkpoint)
        step = checkpoints.step_of(checkpoint)
        set_aside(path, damage, f"training goes on from step {step}, and {again} steps are done again")
    return Resumed(checkpoint=checkpoint, scalars=scalars, damaged=len(damaged))


def first_sound(candidates: Iterable[Path], read: Callable[[Path], T]) -> tuple[Path, T, list[Damaged]] | None:
    """The first checkpoint that `read` does not find damaged, what it gave, and the damaged ones before it.

    None without candidates. Raises CheckpointError if all are damaged.
    """
    damaged: list[Damaged] = []
    for checkpoint in candidates:
        try:
            return checkpoint, read(checkpoint), damaged
        except DamagedCheckpoint as error:
            damaged.append((checkpoint, error))
    if damaged:
        path, first = damaged[0]
        raise CheckpointError(
            "damaged training state, and there is no earlier checkpoint to resume from",
            where=first.where,
            found=first.found,
            expected=first.expected,
            fix=f"remove {path.parent} to train again from the first step, or train in another output folder",
        ) from first
    return None


def set_aside(path: Path, error: DamagedCheckpoint, instead: str) -> None:
    """Rename a damaged checkpoint, and warn of it. `instead` says what happens without it."""
    aside, number = path.with_name(f"{_ASIDE}{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{_ASIDE}{path.name}-{number}")
    path.rename(aside)
    log.warning(
        "checkpoint %s is damaged (%s: %s): %s; the damaged one is kept as %s",
        path.name,
        error.where,
        error.found,
        instead,
        aside,
    )
