"""Memory for large tensors that are written once and freed soon after. Knows sizes only."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# From here on numpy asks for huge pages.
_LARGE = 1 << 22


def large_buffer(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.empty. A large tensor on a CPU gets its memory from numpy, because numpy asks for huge pages.

    The system clears a page when it is first touched. With pages of 4 KiB a product into new memory takes half as long
    again, and every later pass has more addresses to look up.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(dtype).view(shape)
