"""The scalars of a checkpoint: which of them a run must share, and whether all of them are there.

Knows names and types. Does not know files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deepspec_core.errors import CheckpointError

# A run that resumes has the same: they decide which samples each step has.
FIXED: Final = ("seed", "samples", "global_batch_size")
_KEPT: Final = {**dict.fromkeys(FIXED, int), "figures": dict, "counts": dict}


def check_scalars(scalars: Mapping[str, Any], own: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointError if a name is missing or of another type, or a fixed one is not this run's `own`."""
    for name, type_ in _KEPT.items():
        if type(scalars.get(name)) is not type_:
            raise CheckpointError(
                "damaged training state",
                where=f"{checkpoint}: {name}",
                found=repr(scalars.get(name))[:80],
                fix=f"remove {checkpoint} to resume from the checkpoint before it",
            )
    for name in FIXED:
        if scalars[name] != own[name]:
            raise CheckpointError(
                f"training cannot resume: {name} is not what the checkpoint was trained with",
                where=checkpoint,
                found=f"{name} = {own[name]}",
                expected=f"{name} = {scalars[name]}",
                fix="set it back, or train in another output folder",
            )
