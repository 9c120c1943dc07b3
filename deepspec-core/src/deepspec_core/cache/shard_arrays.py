"""A sample as named arrays, as a shard can keep them in any container: tokens, mask, features and their scales.

    input_ids    [T] int32        hidden       [T, C]        hidden_scale       [T, taps] float32
    loss_mask    [T] uint8        last_hidden  [T, H]        last_hidden_scale  [T, 1] float32

Features are in the number format of the cache: bfloat16 as its bits, float8 with a scale a token and layer
(quantize.py). Knows arrays. Does not know files.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepspec_core.cache import quantize
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures

__all__ = ["array_shapes", "arrays_of", "features_from"]


def arrays_of(sample: Sample, features: TargetFeatures, header: CacheHeader) -> dict[str, NDArray[Any]]:
    """The arrays of a sample, by name."""
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": sample.input_ids.numpy().astype("<i4"),
        "loss_mask": sample.loss_mask.numpy().astype("<u1"),
    }
    for name, values in (("hidden", features.hidden), ("last_hidden", features.last_hidden)):
        arrays[name], scales = quantize.encode(values, header.dtype, header.hidden_size)
        if scales is not None:
            arrays[f"{name}_scale"] = scales
    return arrays


def features_from(read: Callable[[str], NDArray[Any]], header: CacheHeader) -> TargetFeatures:
    """The features of a sample, where read(name) gives the array of that name. Others than theirs are not read."""

    def decoded(name: str) -> Any:
        scales = read(f"{name}_scale") if quantize.has_scale(header.dtype) else None
        return quantize.decode(read(name), scales, header.dtype)

    return TargetFeatures(hidden=decoded("hidden"), last_hidden=decoded("last_hidden"))


def array_shapes(header: CacheHeader, tokens: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Name -> shape and type of the arrays of so many tokens."""
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        "input_ids": ((tokens,), np.dtype("<i4")),
        "loss_mask": ((tokens,), np.dtype("<u1")),
    }
    for name, layers in (("hidden", len(header.taps)), ("last_hidden", 1)):
        shapes[name] = ((tokens, layers * header.hidden_size), np.dtype(quantize.ARRAY_TYPES[header.dtype]))
        if quantize.has_scale(header.dtype):
            shapes[f"{name}_scale"] = ((tokens, layers), np.dtype("<f4"))
    return shapes
