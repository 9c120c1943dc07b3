"""A file of weights (safetensors): what it holds, told by its header, and its tensors, read and written.

Knows files; not which weights a draft has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

from attrs import frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec_core.errors import CheckpointError

FLOATING = ("F", "BF")
"""How the format's names of floating-point dtypes begin."""
_SHOWN = 8


@frozen(kw_only=True)
class Header:
    """Shapes and dtypes by name; dtypes as the format calls them."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


def read_header(path: Path) -> Header:
    """What the file holds; no weight is read. CheckpointError where there is no such file, or it cannot be read."""
    with _reading(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return Header(
            shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
            dtypes={name: part.get_dtype() for name, part in slices.items()},
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All of it, mapped into memory. CheckpointError where there is no such file, or it cannot be read."""
    with _reading(path):
        return load_file(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write the file, with the permissions that a new file gets here. safetensors alone gives its owner's only."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"} if metadata is None else dict(metadata))
    path.chmod(S_IMODE(mode))


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError, naming tensors and counting entries, where some of the file's are NaN or infinite."""
    broken = []
    for name, tensor in tensors.items():
        # The sum of finite numbers may overflow, but it takes a twentieth of the time of looking at each.
        if not tensor.sum().isfinite() and (count := int((~tensor.isfinite()).sum())):
            broken.append(f"{name}: {count:,} of {tensor.numel():,} entries")
    if broken:
        more = f" and {len(broken) - _SHOWN} more tensors" if len(broken) > _SHOWN else ""
        raise CheckpointError(
            "weights are not finite numbers",
            where=path,
            found=", ".join(broken[:_SHOWN]) + more,
            expected=f"finite numbers, read as {str(next(iter(tensors.values())).dtype).removeprefix('torch.')}",
            fix="take another checkpoint: training diverged before this one, or the file is damaged",
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        # safetensors says of every file that it cannot open that there is none.
        path.open("rb").close()
    except FileNotFoundError as error:
        raise CheckpointError("the checkpoint has no weights", where=path, expected=path.name) from error
    except OSError as error:
        raise CheckpointError(
            "weights cannot be read", where=path, found=error, expected="a file that may be read"
        ) from error
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            "weights cannot be read", where=path, found=error, fix="the file is damaged: copy or download it again"
        ) from error
