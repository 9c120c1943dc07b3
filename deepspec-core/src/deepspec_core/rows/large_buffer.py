"""Memory for large tensors that are written once and soon given back. Knows sizes only."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# From here on numpy asks for huge pages.
_LARGE = 1 << 22


def large_buffer(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; what is large and on CPU in memory that numpy asks for, since it asks for huge pages.

    Pages are cleared when they are first touched; in pages of 4 KiB a product into new memory takes half as long again,
    and every pass after it has more addresses to look up.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(dtype).view(shape)
