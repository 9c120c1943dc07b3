"""Tensors that are spread over ranks: gathered and written to a file one at a time, and cut again on reading.

The file is a safetensors file of whole tensors by name, so any number of ranks can read it, also one. No rank holds
more than one whole tensor at a time. Knows tensors and one file format. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# What safetensors calls a dtype. https://huggingface.co/docs/safetensors (the format)
_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNED: Final = 8


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has a part of it."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank. If it is sharded, all its ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole `value` that every rank has, spread as `like` is. Nothing is sent."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def save_whole(tensors: Mapping[str, Tensor], path: Path | None) -> None:
    """Write tensors, gathered one after another, as a safetensors file at `path`; None: only take part in gathering.

    Where one of them is sharded, all ranks must call it together with the same names. Raises OSError if there is no
    room.
    """
    # The widest numbers first, so that each tensor begins at a multiple of its own size.
    ordered = sorted(tensors.items(), key=lambda entry: -entry[1].dtype.itemsize)
    if path is None:
        for _, tensor in ordered:
            whole(tensor)
        return
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            flat = whole(tensor.detach()).cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
