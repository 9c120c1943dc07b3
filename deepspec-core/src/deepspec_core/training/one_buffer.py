"""Several tensors in one piece of memory, so that they move between processes or devices in one transfer.

Between processes each piece of memory takes a file descriptor and a handshake of about a millisecond, whatever its
size. Knows tensors and their names. Does not know what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

_ALIGNED = 64  # bytes: a cache line, and a multiple of every dtype's size


@frozen
class Part:
    """Where a tensor lies in the buffer: its dtype, its shape and its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def joined(
    tensors: Mapping[str, Tensor], *, pinned: bool = False, shared: bool = False
) -> tuple[Tensor, dict[str, Part]]:
    """Copies of the tensors in one buffer of bytes, and where each lies.

    `pinned`: in memory that a device can read. `shared`: in memory that another process can read, to be sent to it
    without another copy.
    """
    parts: dict[str, Part] = {}
    end = 0
    for name, tensor in tensors.items():
        parts[name] = Part(tensor.dtype, tuple(tensor.shape), end)
        end += -(-tensor.numel() * tensor.itemsize // _ALIGNED) * _ALIGNED
    if shared:
        # As torch's own loaders collate.
        storage: Any = torch.UntypedStorage
        buffer = torch.empty(0, dtype=torch.uint8).set_(storage._new_shared(end))
    else:
        buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    for name, view in split(buffer, parts).items():
        view.copy_(tensors[name])
    return buffer, parts


def split(buffer: Tensor, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The tensors of a buffer that `joined` made. They share its memory."""
    return {
        name: buffer[part.start : part.start + prod(part.shape) * part.dtype.itemsize].view(part.dtype).view(part.shape)
        for name, part in parts.items()
    }
