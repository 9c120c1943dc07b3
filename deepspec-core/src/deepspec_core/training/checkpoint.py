"""Training states on disk: `checkpoints/step-000100/` with `draft/` (as published) and `state/` (what resuming needs).

A checkpoint is complete or absent, because it is written under another name, synced and then renamed. `state/` holds
fp32 master weights and optimizer tensors (safetensors) and scalars (JSON), by parameter name. Tensors are whole, also
where ranks hold parts of them, so any number of ranks can read them. `manifest.json` holds sizes and checksums. Knows
files and tensors. Does not know training.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deepspec_core.config.train_options import ADAMW
from deepspec_core.disk import free_bytes, in_words, sync
from deepspec_core.errors import CheckpointError
from deepspec_core.json_files import read_object
from deepspec_core.training.optimizers import name_of
from deepspec_core.training.shards import cut_like, save_whole

CHECKPOINTS = "checkpoints"
DRAFT, STATE = "draft", "state"
_WEIGHTS, _OPTIMIZER, _SCALARS, _MANIFEST = (
    "weights.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
_NAME = re.compile(r"step-(\d{6,})")
_FORMAT = 1


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written."""


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a training folder, the oldest first."""
    found = [path for path in (folder / CHECKPOINTS).glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a training folder, or None."""
    found = complete(folder)
    return found[-1] if found else None


def of_step(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / CHECKPOINTS / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps that were done when the checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match.group(1))


def save(
    folder: Path,
    step: int,
    *,
    save_draft: Callable[[Path], None],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scalars: Mapping[str, Any],
    keep: int,
    spare: Collection[int] = (),
) -> Path:
    """Write the checkpoint of `step`, and `prune` the others. A checkpoint that exists is left as it is.

    `parameters` are the trained ones, by name. `save_draft(path)` writes the draft directory. `scalars` are JSON types.
    """
    final = of_step(folder, step)
    if final.exists():
        take_part(parameters, optimizer)
        return final
    remove_unfinished(folder)
    unfinished = final.with_name(f".{final.name}.unfinished")
    (unfinished / STATE).mkdir(parents=True)
    save_draft(unfinished / DRAFT)
    save_whole(parameters, unfinished / STATE / _WEIGHTS)
    save_whole(_moments(parameters, optimizer), unfinished / STATE / _OPTIMIZER)
    own = {"format": _FORMAT, "step": step, "optimizer": name_of(optimizer)}
    _write_json(unfinished / STATE / _SCALARS, {**own, **scalars})
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(unfinished)): _fingerprint(path) for path in files}
    _write_json(unfinished / _MANIFEST, manifest)
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    unfinished.rename(final)
    sync(final.parent)
    prune(folder, keep=keep, spare=spare)
    return final


def prune(folder: Path, *, keep: int, spare: Collection[int] = ()) -> None:
    """Remove all checkpoints but the newest `keep` and those of the steps in `spare`."""
    for old in complete(folder)[:-keep]:
        if step_of(old) not in spare:
            # Renamed first, so that an interrupted removal does not leave half a checkpoint under a valid name.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))


def take_part(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """On ranks other than the first, while it saves: give it this rank's parts of weights and optimizer tensors."""
    save_whole(parameters, None)
    save_whole(_moments(parameters, optimizer), None)


def _moments(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}:{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def bytes_of_one(draft: nn.Module) -> int:
    """Bytes of a checkpoint: trained weights in fp32 with two moments each, and the draft in its own dtype."""
    trained = sum(part.numel() for part in draft.parameters() if part.requires_grad)
    own: int = sum(value.nbytes for value in draft.state_dict().values())
    return 12 * trained + own


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise CheckpointError if the disk has no room for a checkpoint of that size."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise CheckpointError(
            "the disk has no room for a checkpoint",
            where=folder,
            found=f"{in_words(free)} free",
            expected=in_words(needed_bytes),
            fix="free some space, or choose another run.output",
        )


def remove_unfinished(folder: Path) -> int:
    """Delete unfinished checkpoints that a killed process left. Returns how many there were."""
    rests = [path for path in (folder / CHECKPOINTS).glob(".step-*") if path.is_dir()]
    for path in rests:
        shutil.rmtree(path)
    return len(rests)


def restore(checkpoint: Path, *, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights and optimizer state, and return the scalars. CheckpointError names a file that does not fit."""
    verify(checkpoint)
    scalars = _scalars_for(checkpoint, optimizer)
    weights = _load(checkpoint / STATE / _WEIGHTS)
    _same_names(checkpoint / STATE / _WEIGHTS, set(weights), parameters, weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(cut_like(weights[name], parameter))
    states: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for entry, value in _load(checkpoint / STATE / _OPTIMIZER).items():
        key, _, name = entry.partition(":")
        like = parameters.get(name)
        # Scalars, such as a count of steps, are whole on every rank.
        states.setdefault(name, {})[key] = value if like is None or not value.dim() else cut_like(value, like)
    _same_names(checkpoint / STATE / _OPTIMIZER, set(states), parameters, {})
    # The optimizer numbers its parameters in the order in which it got them, which is that of the mapping.
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(held)}
    optimizer.load_state_dict(
        {
            "state": {numbers[id(parameters[name])]: state for name, state in states.items() if state},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    return scalars


def _scalars_for(checkpoint: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Raise CheckpointError if they are of another version, or of another optimizer."""
    path = checkpoint / STATE / _SCALARS
    scalars: dict[str, Any] = _read_json(path)
    if scalars.get("format") != _FORMAT:
        raise CheckpointError(
            "training state of another version",
            where=path,
            found=f"format {scalars.get('format')}",
            expected=f"format {_FORMAT}",
            fix="resume with the version of deepspec-core that wrote it, or train again in another output folder",
        )
    written = scalars.get("optimizer", ADAMW)  # older checkpoints do not say it
    if written != name_of(optimizer):
        raise CheckpointError(
            "training state of another optimizer",
            where=path,
            found=str(written),
            expected=name_of(optimizer),
            fix="set train.optimizer back, or train in another output folder",
        )
    return scalars


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def _damaged(path: Path, found: object) -> DamagedCheckpoint:
    checkpoint = path.parent if path.name == _MANIFEST else path.parent.parent
    return DamagedCheckpoint(
        "damaged training state",
        where=path,
        found=found,
        expected="the file as it was written",
        fix=f"remove {checkpoint} to resume from the checkpoint before it, or to start anew where there is none",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, kind=CheckpointError)
    except (OSError, CheckpointError) as error:
        raise _damaged(path, error.found if isinstance(error, CheckpointError) else error) from error


def verify(checkpoint: Path) -> None:
    """Raise DamagedCheckpoint if a file of the checkpoint is missing or changed.

    Training goes on from some of them, and the draft is published.
    """
    manifest = _read_json(checkpoint / _MANIFEST)
    for name in (_WEIGHTS, _OPTIMIZER, _SCALARS):
        if f"{STATE}/{name}" not in manifest:
            raise _damaged(checkpoint / _MANIFEST, f"no entry for {STATE}/{name}")
    for name, expected in manifest.items():
        path = checkpoint / name
        if ".." in path.parts or Path(name).is_absolute() or not _is_fingerprint(expected):
            raise _damaged(checkpoint / _MANIFEST, f"{name}: {expected}")
        if not path.is_file():
            raise _damaged(path, "no file")
        if path.stat().st_size != expected["bytes"]:
            raise _damaged(path, f"{path.stat().st_size} bytes instead of {expected['bytes']}")
        if _fingerprint(path) != expected:
            raise _damaged(path, "its checksum differs from the manifest's")


def _is_fingerprint(value: Any) -> bool:
    return (
        isinstance(value, dict) and value.keys() == {"bytes", "crc32"} and all(type(n) is int for n in value.values())
    )


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _same_names(path: Path, found: set[str], parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    differing = sorted(found ^ set(parameters))
    differing += [
        name for name, value in weights.items() if name not in differing and value.shape != parameters[name].shape
    ]
    if differing:
        raise CheckpointError(
            "training state of another draft",
            where=path,
            found=f"{len(differing)} parameters differ, the first: {differing[0]}",
            expected="the parameters this run trains, by name and shape",
            fix="set [draft] back to what the checkpoint was trained with, or train in another output folder",
        )
