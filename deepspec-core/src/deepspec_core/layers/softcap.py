"""Soft-capped logits, as some families form them. Knows a number; not whose logits they are."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["softcapped"]


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), of any shape; the logits themselves without a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
