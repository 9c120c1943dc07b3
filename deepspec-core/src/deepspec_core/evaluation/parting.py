"""Finds where two greedy outputs of one prompt part, and how close the target's logits of the two tokens are there.

Verification scores several tokens at once; plain decoding scores one. Their sums are rounded differently, coarsely so
in bfloat16. So where two tokens are almost equally likely, the two ways may choose differently. A small gap of the
logits means that this happened; a large gap means that something is wrong. This file knows outputs and one pass of the
target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import evolve, frozen

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetModel
from deepspec_core.decoding.engine import Completion
from deepspec_core.decoding.sampling import penalised


@frozen(kw_only=True)
class Parting:
    """An output that differs from plain decoding's.

    position: The index, from 0, of the first output token that differs. None in older journals, which did not record
        it or the fields below.
    plain_token, speculative_token: The two tokens there; None where that output has ended.
    logit_gap: The target's logit of the plain token minus that of the speculative token, in one pass over the prompt
        and the tokens that both outputs share. Negative where that pass prefers the speculative token.
    """

    id: str
    position: int | None = None
    plain_token: int | None = None
    speculative_token: int | None = None
    logit_gap: float | None = None


def differs(fast: Completion, plain: Completion | None) -> bool:
    """Whether the two outputs of one prompt differ. A later turn after different answers is another prompt."""
    return plain is not None and fast.prompt_ids == plain.prompt_ids and fast.output_ids != plain.output_ids


@torch.no_grad()
def parting(target: TargetModel, fast: Completion, plain: Completion, sampling: Sampling) -> Parting:
    """Where the two outputs part. They must differ.

    The sampling's penalty is applied to the logits. The target loses the sequences in its slots.
    """
    pairs = zip(fast.output_ids, plain.output_ids, strict=False)
    shortest = min(len(fast.output_ids), len(plain.output_ids))
    position = next((index for index, (one, other) in enumerate(pairs) if one != other), shortest)
    ours, own = _at(fast, position), _at(plain, position)
    gap = None
    if ours is not None and own is not None:
        ids = (*plain.prompt_ids, *plain.output_ids[:position])
        target.open_slots(1, len(ids) + 1)
        slot = torch.zeros(1, dtype=torch.long, device=target.device)
        ids_BT = torch.tensor([ids], device=target.device)
        positions_BT = torch.arange(len(ids), device=target.device)[None]
        logits_BV = target.decode(slot, ids_BT, positions_BT, (), last_only=True).logits[:, 0].float()
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter_(1, ids_BT, True)
        logits_V = penalised(logits_BV, evolve(sampling, seen=seen_BV))[0]
        gap = float(logits_V[own] - logits_V[ours])
    return Parting(id=fast.id, position=position, plain_token=own, speculative_token=ours, logit_gap=gap)


def recorded_parting(entry: str | Mapping[str, Any]) -> Parting:
    """The parting that a journal's entry records. Entries of older journals have the id alone."""
    return Parting(id=entry) if isinstance(entry, str) else Parting(**entry)


def _at(completion: Completion, position: int) -> int | None:
    return completion.output_ids[position] if position < len(completion.output_ids) else None
