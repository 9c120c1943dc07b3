"""Runs a tiny target in slots, and transformers' own model of it on one text alone, for tests of target families.

This file knows the contract of targets and transformers' conventions.

Legend: B slots, T tokens, H hidden size, C = taps * H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepspec_core.contracts.target import TargetModel

TAPS = (-1, 0, 2, 3)
"""The taps that tests read, of six layers. -1 is the input of the first."""


@torch.no_grad()
def alone(model: Any, ids_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Taps [T, C], last hidden [T, H] and logits [T, V] of one text, by the model's own forward."""
    out = model(ids_T[None], output_hidden_states=True)
    taps = torch.cat([out.hidden_states[tap + 1] for tap in TAPS], dim=-1)
    return taps[0], out.hidden_states[-1][0], out.logits[0]


def step(target: TargetModel, rows: Mapping[int, Tensor], start: Mapping[int, int], **options: Any) -> Any:
    """Feed rows to slots at their committed lengths, padded to the longest with -1."""
    width = max(len(row) for row in rows.values())
    ids_BT, positions_BT = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -1)
    for index, (slot, row) in enumerate(rows.items()):
        ids_BT[index, : len(row)] = row
        positions_BT[index, : len(row)] = torch.arange(len(row)) + start[slot]
    return target.decode(torch.tensor(list(rows)), ids_BT, positions_BT, TAPS, **options)
