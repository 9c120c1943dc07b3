"""Turns the sums of an optimizer step into its gradient, with one division by the step's denominator over all ranks.

Backward adds up gradients of sums, so the number and sizes of micro-batches and ranks do not matter. Data parallelism
averages over ranks, so the gradient is also multiplied by world_size. Knows sums and gradients. Does not know drafts,
losses or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspec_core.rows.metrics import Ratio
from deepspec_core.training.shards import whole


class StepSums:
    """One rank's sums of one optimizer step, on the device: the denominator of its gradient, and metrics by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.denominator = torch.zeros((), device=device)
        self.ratios: dict[str, Tensor] = {}  # name -> [2]

    def add(self, denominator: Tensor, metrics: Mapping[str, Ratio]) -> None:
        """Add the sums of a micro-batch. Nothing is read back from the device."""
        self.denominator = self.denominator + denominator.to(torch.float32)
        for name, pair in metrics.items():
            ratio = torch.stack([part.to(torch.float32) for part in pair])
            self.ratios[name] = self.ratios[name] + ratio if name in self.ratios else ratio

    def add_counts(self, name: str, numerator: int, denominator: int) -> None:
        """Add counts from the host to a metric. Nothing is copied to the device."""
        counts = [torch.full((), float(count), device=self.device) for count in (numerator, denominator)]
        self.ratios[name] = torch.stack(counts) + self.ratios.get(name, 0.0)

    def reduce(self, names: Sequence[str], flag: bool) -> Tensor:
        """[2 + 2 * len(names)], equal on all ranks: the denominator, how many ranks raise `flag`, the ratios."""
        zero = torch.zeros(2, device=self.device)
        first = torch.stack((self.denominator, torch.full_like(self.denominator, float(flag))))
        vector = torch.cat((first, *(self.ratios.get(name, zero) for name in names)))
        if _distributed():
            torch.distributed.all_reduce(vector)
        return vector


def normalise(parameters: Sequence[Tensor], denominator: Tensor, *, world_size: int, clip_norm: float) -> Tensor:
    """Divide the gradients by the step's denominator, clip them, and return their norm [] before clipping.

    The norm is that of the whole gradient, also where ranks hold parts of it. A step without supervised rows has
    denominator 0. Its gradients are zero and stay zero. A weight that no row of the step read gets a gradient of zero,
    as it has one where other ranks may have read it.
    """
    scale = torch.where(denominator > 0, world_size / denominator, 0.0)
    gradients = filled_gradients(parameters)
    # The norm of undivided gradients, divided: gradients are read once for it, and written once for all.
    norm = whole(torch.nn.utils.get_total_norm(gradients)) * scale
    torch._foreach_mul_(gradients, scale * (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def filled_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Their gradients. One that had none gets one of zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters]  # type: ignore[misc]


def gathered(value: Any) -> list[Any]:
    """The `value` of every rank, in the order of ranks."""
    if not _distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def union(parts: list[list[str]]) -> list[str]:
    """The names that any rank has, in one order, because a rank may have seen fewer slots than another."""
    return list(dict.fromkeys(name for part in parts for name in part))


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
