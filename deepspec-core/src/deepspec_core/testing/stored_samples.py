"""Compares samples that were read with those that were written, and catches the errors that readers raise.

This file knows samples. It does not know how they are stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from deepspec_core.contracts.draft import Sample
from deepspec_core.errors import DeepSpecError


def error_of(kind: type[DeepSpecError], attempt: Callable[[], object]) -> str | None:
    """The message of the error of this kind that the call raises; None if it raises none."""
    try:
        attempt()
    except kind as error:
        return str(error)
    return None


def differs(found: Sample, sample: Sample, dtype: torch.dtype) -> str | None:
    """A description of the first difference from what was written."""
    if found.id != sample.id:
        return f"id {found.id!r}, not {sample.id!r}"
    if found.original_length != sample.original_length:
        return f"original_length {found.original_length}, not {sample.original_length}"
    for name in ("input_ids", "loss_mask"):
        mine, theirs = getattr(found, name), getattr(sample, name)
        if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
            return f"`{name}` is {mine.dtype} {mine.tolist()}, not {theirs.dtype} {theirs.tolist()}"
    if sample.features is None:
        return None
    if found.features is None:
        return "no features"
    for name in ("hidden", "last_hidden"):
        mine, theirs = getattr(found.features, name), getattr(sample.features, name).to(dtype)
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"`{name}` is {list(mine.shape)} {mine.dtype}, not {list(theirs.shape)} {theirs.dtype}"
        if not torch.equal(mine, theirs):
            return f"`{name}` has other numbers"
    return None
