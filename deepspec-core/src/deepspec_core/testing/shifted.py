"""Weights at other addresses. A model that is loaded again may have them; tests make it happen on every machine.

Vector instructions go over memory in steps of up to 64 bytes, and a matrix that begins elsewhere is summed in another
order. Two models with equal weights may thus differ in the last bit. A test that compares a model with its reloaded
copy shifts the copy first, so that a bitwise comparison fails wherever it is written and not on one machine in ten.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["ALIGNMENT", "shifted"]

ALIGNMENT = 64
"""Bytes that PyTorch aligns its own tensors to on the CPU."""

_Module = TypeVar("_Module", bound=nn.Module)


def shifted(module: _Module) -> _Module:
    """The same module, with floating-point parameters and buffers moved to addresses that are not aligned."""
    moved: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and id(tensor) not in moved:
            moved[id(tensor)] = tensor
            tensor.data = _elsewhere(tensor.data)
    return module


def _elsewhere(tensor: Tensor) -> Tensor:
    """A copy that begins one element past a multiple of the alignment."""
    size = tensor.element_size()
    buffer = torch.empty(tensor.numel() + 2 * ALIGNMENT // size, dtype=tensor.dtype)
    first = -(buffer.data_ptr() // size) % (ALIGNMENT // size) + 1
    place = buffer[first : first + tensor.numel()].view(tensor.shape)
    place.copy_(tensor)
    assert place.data_ptr() % ALIGNMENT == size
    return place
