"""How feature tensors are stored as plain arrays: a storage type to arrays, and back.

float32 and float16 are stored unchanged, bfloat16 as its bits (uint16), float8_e4m3 as its bits (uint8) with one scale
for each token and layer. Scales are powers of two, so the stored values are exact in bfloat16: rounding happens only
when features are stored. Knows tensors only.

Legend: T tokens, C = layers * H, G groups of H.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepspec_core.dtypes import torch_dtype

ARRAY_TYPES: Final = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float8_e4m3": "<u1"}
_FLOAT8: Final = torch.float8_e4m3fn
_FLOAT8_MAX: Final = torch.finfo(_FLOAT8).max


def has_scale(dtype: str) -> bool:
    """Whether tensors of this storage type come with scales."""
    return dtype == "float8_e4m3"


def encode(values_TC: Tensor, dtype: str, group: int) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """The stored array [T, C] and, for float8, scales [T, G] float32; `group` is how many channels share one."""
    if not has_scale(dtype):
        stored = values_TC.to(torch_dtype(dtype)).contiguous()
        return (stored.view(torch.uint16) if dtype == "bfloat16" else stored).numpy(), None
    groups_TGH = values_TC.float().reshape(len(values_TC), values_TC.shape[1] // group, group)
    peaks_TG = groups_TGH.abs().amax(-1)
    exponents_TG = torch.ceil(torch.log2((peaks_TG / _FLOAT8_MAX).clamp(min=2.0**-100)))
    scales_TG = torch.exp2(exponents_TG)
    # log2 rounds: a peak a hair above the largest value is brought back to it.
    scaled_TC = (groups_TGH / scales_TG[..., None]).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).flatten(-2)
    return scaled_TC.to(_FLOAT8).contiguous().view(torch.uint8).numpy(), scales_TG.numpy()


def decode(array_TC: NDArray[np.generic], scales_TG: NDArray[np.generic] | None, dtype: str) -> Tensor:
    """The tensor [T, C]: in its storage type, bfloat16 where that is float8."""
    stored = torch.from_numpy(array_TC)
    if scales_TG is not None:
        scales: Tensor = torch.from_numpy(scales_TG)
        values_TGH = stored.view(_FLOAT8).float().reshape(*scales.shape, stored.shape[-1] // max(1, scales.shape[-1]))
        return (values_TGH * scales[..., None]).flatten(-2).to(torch.bfloat16)
    return stored.view(torch.bfloat16) if dtype == "bfloat16" else stored


def bytes_per_token(dtype: str, channels: int, group: int) -> int:
    """Of `channels` values, scales included."""
    size = np.dtype(ARRAY_TYPES[dtype]).itemsize * channels
    return size + 4 * (channels // group) if has_scale(dtype) else size
