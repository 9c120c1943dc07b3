"""Recognises errors that mean that memory ran out, on an accelerator or on the CPU.

This file knows errors. It does not know what took the memory.
"""

from __future__ import annotations

import torch

# PyTorch's allocator for the CPU has no error of its own, and libraries of an accelerator have texts only.
_TEXTS = ("DefaultCPUAllocator", "not enough memory: you tried to allocate", "out of memory", "_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out, so that a smaller batch may succeed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
