"""Drafts that are wrong in training alone, or in what they train on, in one way each, as its docstring says."""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve
from last_hidden_draft import LastHiddenDraft
from torch import Tensor, nn
from wrong_drafts import Caught, _Rows

from deepspec_core.contracts.draft import DraftBatch, Texts
from deepspec_core.contracts.rows import Rows


class DividesByNothing(_Rows):
    """a denominator of 0"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, denominator=torch.tensor(0.0))


class ExtrasLeak(_Rows):
    """extras that depend on the texts beside"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, extras={"confidence_logits": rows.hidden.detach().mean().expand(len(rows.hidden))})


class LeaksInTraining(LastHiddenDraft):
    """leaks between texts in training alone: batch norm"""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.batch_norm = nn.BatchNorm1d(32)

    def blocks(self, last_NH: Tensor, anchor_ids_N: Tensor) -> Tensor:
        found_NKH = super().blocks(last_NH, anchor_ids_N)
        normed: Tensor = self.batch_norm(found_NKH.flatten(0, 1)).view_as(found_NKH)
        return normed


class ReadsLabelsInTraining(_Rows):
    """reads the label in training alone"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        added_NH = self.embed_tokens(rows.target_ids) if self.training else 0.0
        return evolve(rows, hidden=rows.hidden + added_NH)


class WritesByChance(LastHiddenDraft):
    """writes texts to train on with random numbers of its own, over prompts too"""

    def rollout(self, texts: Texts, uniforms: Tensor) -> Texts:
        return evolve(texts, input_ids=torch.randint(2, 60, texts.input_ids.shape))


class WritesOverPrompts(LastHiddenDraft):
    """writes texts to train on over prompts"""

    def rollout(self, texts: Texts, uniforms: Tensor) -> Texts:
        return evolve(texts, input_ids=(uniforms * 60).long())


class TrainsSlot0Alone(_Rows):
    """trains the rows of slot 0 alone"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, hidden=torch.where((rows.slot > 0)[:, None], rows.hidden.detach(), rows.hidden))


class CastsNothing(LastHiddenDraft):
    """fails on features in bfloat16 beside weights in float32"""

    def blocks(self, last_NH: Tensor, anchor_ids_N: Tensor) -> Tensor:
        embedded_NH = self.embed_tokens(anchor_ids_N).to(last_NH.dtype)
        added_NH = self.up(torch.tanh(self.down(torch.cat([last_NH, embedded_NH], dim=-1))))
        normed_NKH: Tensor = self.norm(last_NH[:, None] + added_NH.unflatten(-1, (self.options.block_size, -1)))
        return normed_NKH


CAUGHT = (
    Caught(TrainsSlot0Alone, "every_slot_is_trained", "slot 1"),
    Caught(CastsNothing, "features_in_another_dtype", "dtype"),
    Caught(DividesByNothing, "rows_keep_their_form", "denominator"),
    Caught(ExtrasLeak, "neighbours_do_not_matter", "extras"),
    Caught(LeaksInTraining, "neighbours_do_not_matter", "hidden"),
    Caught(ReadsLabelsInTraining, "decoding_sees_what_training_sees", "probabilities"),
    Caught(WritesByChance, "rollout_follows_its_numbers", "random numbers"),
    Caught(WritesOverPrompts, "rollout_follows_its_numbers", "prompt"),
)
