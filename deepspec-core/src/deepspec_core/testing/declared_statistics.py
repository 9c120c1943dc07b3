"""Statistics for tests of loss terms and weightings: what is not declared may not be read, and nothing may be changed.

This file knows the contract of statistics. It does not know what reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepspec_core.rows.statistics import ChunkStats
from deepspec_core.testing.conformance import require

_NAMES = (
    "ce", "draft_argmax", "target_ids", "draft_logits", "tv", "overlap", "soft_ce", "kl", "acceptance",
    "target_argmax", "target_logits",
)  # fmt: skip


def copies_of(stats: ChunkStats) -> dict[str, Tensor]:
    """Copies of all statistics, by name."""
    return {name: getattr(stats, name).detach().clone() for name in _NAMES}


def changed_in(stats: ChunkStats, before: Mapping[str, Tensor]) -> list[str]:
    """The names of the statistics that are no longer as they were copied."""
    return [name for name, value in before.items() if not torch.equal(getattr(stats, name), value)]


def tensor_of(value: Any, what: str) -> Tensor:
    """The value that a term or weighting has returned. Raises Unmet if it is no tensor."""
    require(isinstance(value, Tensor), f"{what} is of type {type(value).__name__}, not a tensor")
    returned: Tensor = value
    return returned


class Declared:
    """Statistics that refuse logits to a term or weighting that does not say `needs_logits`."""

    def __init__(self, stats: ChunkStats, reader: Any) -> None:
        self._stats, self._reader = stats, reader

    def __getattr__(self, name: str) -> Any:
        if name in ("draft_logits", "target_logits"):
            require(getattr(self._reader, "needs_logits", False), f"it reads `{name}` without needs_logits = True")
        if name == "ce_without_correction" and getattr(self._reader, "needs_uncorrected", False):
            return self._stats.ce
        return getattr(self._stats, name)
