"""Weights of a target that a draft asks for by the beginnings of their names, such as the target's own draft layers.

Knows the safetensors files of a directory, as transformers reads them: the shards of an index, or one file. Does not
know what the weights are for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen
from safetensors import safe_open
from torch import Tensor

from deepspec_core.checkpoints.weight_file import read_header
from deepspec_core.errors import CheckpointError, TargetError
from deepspec_core.json_files import read_object, value_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHOWN = 5
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@frozen
class StoredWeight:
    """Where a weight lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def shards_of(path: Path) -> dict[str, str]:
    """The file of each weight by the index at `path`. TargetError where a file would lie outside the index's folder."""
    shards = value_of(
        read_object(path, kind=TargetError, strict=False), "weight_map", dict, path=path, kind=TargetError, absent={}
    )
    for name in set(map(str, shards.values())):
        if Path(name).name != name or name in (".", ".."):
            raise TargetError(
                "the index of the target's weights names a file outside its folder",
                where=path,
                found=name,
                expected="names of files in the same folder",
            )
    return {str(weight): str(name) for weight, name in shards.items()}


def find_weights(folder: Path, prefixes: Sequence[str]) -> dict[str, StoredWeight]:
    """The weights whose names begin with one of `prefixes`, by name. Only headers are read.

    TargetError where a prefix fits none, or a file cannot be read.
    """
    index = folder / INDEX
    files = shards_of(index) if index.is_file() else {}
    names = list(files)
    if not names:
        names = list(_header(folder / SINGLE))
        files = dict.fromkeys(names, SINGLE)
    wanted = wanted_names(names, prefixes, where=folder)
    found: dict[str, StoredWeight] = {}
    for file in sorted({files[name] for name in wanted}):
        header = _header(folder / file)
        for name in wanted:
            if files[name] == file and name in header:
                found[name] = StoredWeight(folder / file, *header[name])
    gone = [name for name in wanted if name not in found]
    if gone:
        raise TargetError(
            "a file of the target lacks weights that the index places there",
            where=folder / files[gone[0]],
            found=f"no {', '.join(gone[:_SHOWN])}",
            fix="Copy or download the target again.",
        )
    return found


def wanted_names(names: Sequence[str], prefixes: Sequence[str], *, where: object) -> list[str]:
    """Those of `names` that begin with one of `prefixes`. TargetError, with names like it, for one that fits none."""
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise TargetError(
                "the target lacks weights that the draft needs",
                where=where,
                found=f"no name that begins with {prefix!r}; {_near(prefix, names)}",
                expected=f"weights named {prefix}...",
                fix="Use a target that has them, or another draft.",
            )
    return sorted(name for name in names if name.startswith(tuple(prefixes)))


def read_weights(found: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
    """The weights, as they are stored, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({stored.file for stored in found.values()}):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name, stored in found.items() if stored.file == file}
    return tensors


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise TargetError(error.problem, where=path, found=error.found, fix=error.fix) from error
    return {name: (shape, _DTYPES.get(header.dtypes[name], torch.float32)) for name, shape in header.shapes.items()}


def _near(prefix: str, names: Sequence[str]) -> str:
    """The beginnings of names, as long as the prefix, that are most like it."""
    parts = prefix.rstrip(".").count(".") + 1
    heads = sorted({".".join(name.split(".")[:parts]) for name in names})
    near = difflib.get_close_matches(prefix.rstrip("."), heads, n=_SHOWN, cutoff=0.0)
    return f"there are {', '.join(f'{head}...' for head in near)}" if near else "there are no weights"
