"""Checks that a draft that writes its own training texts leaves prompts, padding and lengths unchanged.

This file knows texts and the random numbers of a rollout. It does not know how a draft writes.
"""

from __future__ import annotations

import torch

from deepspec_core.contracts.draft import DraftBatch, DraftModel, Texts
from deepspec_core.testing.conformance import require
from deepspec_core.testing.global_draws import no_global_draws


def check_rollout(draft: DraftModel, batch: DraftBatch) -> None:
    """Raise Unmet if the texts that the draft writes in place of the batch's break the contract of `rollout`."""
    texts = Texts(input_ids=batch.input_ids, loss_mask=batch.loss_mask, attention_mask=batch.attention_mask.bool())
    uniforms_BT = torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(1)).double()
    with no_global_draws(), torch.no_grad():
        first, again = draft.rollout(texts, uniforms_BT), draft.rollout(texts, uniforms_BT)
    require(torch.equal(first.input_ids, again.input_ids), "other tokens with the same numbers")
    require(first.input_ids.shape == texts.input_ids.shape, f"tokens {list(first.input_ids.shape)}")
    prompt_BT = (texts.loss_mask.cumsum(1) == 0) & texts.attention_mask
    require(torch.equal(first.input_ids[prompt_BT], texts.input_ids[prompt_BT]), "other tokens in a prompt")
    require(torch.equal(first.attention_mask, texts.attention_mask), "texts of other lengths")
