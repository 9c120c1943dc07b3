"""A file of weights (safetensors): what it holds, told by its header, and its tensors.

Knows files; not which weights a draft has.
"""

from __future__ import annotations

from pathlib import Path

from attrs import frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from deepspec_core.errors import CheckpointError


@frozen(kw_only=True)
class Header:
    """Shapes by name, and the dtypes that occur."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[str, ...]


def read_header(path: Path) -> Header:
    """What the file holds; no weight is read. CheckpointError where there is no such file, or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return Header(
                shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
                dtypes=tuple(sorted({part.get_dtype() for part in slices.values()})),
            )
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All of it, mapped into memory. CheckpointError where there is no such file, or it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError("the checkpoint has no weights", where=path, expected=path.name)
    return CheckpointError(
        "weights cannot be read", where=path, found=error, fix="the file is damaged: copy or download it again"
    )
