"""Drafts and proposers that are wrong in one way each. Each class says in its docstring what is wrong.

They are the draft of last_hidden_draft.py otherwise, which keeps every clause.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from last_hidden_draft import LastHiddenDraft, LastHiddenProposer
from torch import Tensor, nn

from deepspec_core.contracts.draft import DraftBatch, DraftDescription, PreparedSample, Sample
from deepspec_core.contracts.proposer import Proposal
from deepspec_core.contracts.rows import Rows
from deepspec_core.preparation.anchors import AnchorPreparation, anchored_rows, drawn


class _Rows(LastHiddenDraft):
    """Its rows are changed."""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        raise NotImplementedError

    def forward(self, batch: DraftBatch) -> Rows:
        return self.changed(super().forward(batch), batch)


class WrongShape(_Rows):
    """weights of another shape"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, weight=rows.weight[:, None])


class WrongLength(_Rows):
    """numbers of blocks for all rows but one"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, block=rows.block[:-1])


class Exits(_Rows):
    """ends the process in `forward`"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        sys.exit(3)


class LabelsOffByOne(_Rows):
    """labels off by one"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, target_ids=rows.target_ids.roll(1))


class TargetsOffByOne(_Rows):
    """compared with the target one position late"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        prepared = batch.prepared
        later_P = (prepared["target_position"] + 1).clamp(max=batch.input_ids.shape[1] - 1)
        return evolve(rows, target_hidden=batch.features.last_hidden[prepared["target_sequence"], later_P])


class LabelsAlone(_Rows):
    """right: labels, and no target positions"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, target_hidden=None, target_index=None)


class LabelsAloneOffByOne(LabelsOffByOne):
    """labels of the row before, without target positions"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(super().changed(rows, batch), target_hidden=None, target_index=None)


class UnsortedBlocks(_Rows):
    """unsorted blocks"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, block=rows.block.flip(0))


class InterleavedSlots(_Rows):
    """slots of blocks interleaved: all slots 0, then all slots 1"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        by_slot = torch.argsort(rows.slot, stable=True)
        names = ("hidden", "target_index", "target_ids", "weight", "slot", "block")
        return evolve(rows, **{name: getattr(rows, name)[by_slot] for name in names})


class IgnoresSlots(_Rows):
    """ignores slots: every row has slot 0"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, slot=torch.zeros_like(rows.slot))


class SlotsFromBehind(_Rows):
    """slots counted with gaps"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, slot=2 * rows.slot)


class LeaksBetweenTexts(_Rows):
    """leaks between neighbours in a batch"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, hidden=rows.hidden + rows.hidden.mean(0))


class ChangesUnderPadding(_Rows):
    """changes under padding"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, hidden=rows.hidden + 0.01 * batch.input_ids.shape[1])


class LeaksInAPackedRow(LastHiddenDraft):
    """leaks between the conversations of a packed row: all read the row's first token"""

    def forward(self, batch: DraftBatch) -> Rows:
        sequence_N, anchors_N = batch.prepared["sequence"], batch.prepared["anchors"]
        last_NH = batch.features.last_hidden[sequence_N, (anchors_N - 1).clamp(min=0)]
        first_NH = self.embed_tokens(batch.input_ids[sequence_N, 0])
        return anchored_rows(batch, self.blocks(last_NH + first_NH, batch.input_ids[sequence_N, anchors_N]))


class CountsPositionsInTheRow(LastHiddenDraft):
    """counts positions in a packed row, not in its conversation"""

    def forward(self, batch: DraftBatch) -> Rows:
        sequence_N, anchors_N = batch.prepared["sequence"], batch.prepared["anchors"]
        last_NH = batch.features.last_hidden[sequence_N, (anchors_N - 1).clamp(min=0)]
        last_NH = last_NH * torch.cos(0.1 * anchors_N[:, None])
        return anchored_rows(batch, self.blocks(last_NH, batch.input_ids[sequence_N, anchors_N]))


class Dropout(_Rows):
    """draws random numbers in `forward`"""

    def changed(self, rows: Rows, batch: DraftBatch) -> Rows:
        return evolve(rows, hidden=nn.functional.dropout(rows.hidden, 0.1))


class TrainsTheHead(LastHiddenDraft):
    """trains the target's lm_head"""

    def adopt(self, embedding_VH: Tensor, head_VH: Tensor) -> None:
        super().adopt(embedding_VH, head_VH)
        self.lm_head.requires_grad_(True)


class IdleWeight(LastHiddenDraft):
    """has a weight that no gradient reaches"""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.idle = nn.Linear(4, 4)


class OutsideStateDict(LastHiddenDraft):
    """computes with weights that are not in the state dict"""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.kept = [torch.randn(32, device="cpu")]

    def blocks(self, last_NH: Tensor, anchor_ids_N: Tensor) -> Tensor:
        return super().blocks(last_NH, anchor_ids_N) + self.kept[0]


class SaysOtherTaps(LastHiddenDraft):
    """says other taps than it was built with"""

    def describe(self) -> DraftDescription:
        return evolve(super().describe(), taps=(3,))


class _GlobalDraws(AnchorPreparation):
    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        own = np.random.default_rng(int(np.random.randint(1000)))
        return self.at(sample, drawn(self._candidates(sample), self.num_anchors, own))


class PreparesByChance(LastHiddenDraft):
    """draws anchors from random numbers of its own"""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.preparation = _GlobalDraws(num_predictions=self.options.block_size, num_anchors=6, first=1)


class _Decoding(LastHiddenDraft):
    """Its proposer is another."""

    wrong: type[LastHiddenProposer]

    def proposer(self) -> LastHiddenProposer:
        return self.wrong(self)


class ForgetsACommittedToken(_Decoding):
    """forgets the last committed token"""

    class wrong(LastHiddenProposer):
        def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
            super().accept(slots, committed_ids, (committed - 1).clamp(min=1), features)


class TooManyTokens(_Decoding):
    """proposes more tokens than the limit"""

    class wrong(LastHiddenProposer):
        def propose(self, slots: Tensor, limits: Tensor, *given: Any) -> Proposal:
            return super().propose(slots, torch.full_like(limits, self.max_tokens), *given)


class DrawsItsOwn(_Decoding):
    """draws its own random numbers"""

    class wrong(LastHiddenProposer):
        def propose(self, slots: Tensor, limits: Tensor, sampling: Any, uniforms: Tensor, stop: Any) -> Proposal:
            return super().propose(slots, limits, sampling, torch.rand_like(uniforms), stop)


class OtherFeatures(_Decoding):
    """decodes from other features than those of training: one position early"""

    class wrong(LastHiddenProposer):
        def start(self, slots: Tensor, ids: Tensor, lengths: Tensor, first: Tensor, features: Tensor) -> None:
            super().start(slots, ids, (lengths - 1).clamp(min=1), first, features)


class CountsRowsForSlots(_Decoding):
    """takes the rows of a call for slots"""

    class wrong(LastHiddenProposer):
        def propose(self, slots: Tensor, limits: Tensor, *given: Any) -> Proposal:
            return super().propose(torch.arange(len(slots)), limits, *given)


class NeighboursInABatch(_Decoding):
    """mixes the slots of a call"""

    class wrong(LastHiddenProposer):
        def propose(self, slots: Tensor, *given: Any) -> Proposal:
            kept_SH = self.last_SH
            self.last_SH = kept_SH + 0.1 * kept_SH[slots].mean(0)
            found = super().propose(slots, *given)
            self.last_SH = kept_SH
            return found


class Logarithms(_Decoding):
    """returns logarithms of probabilities"""

    class wrong(LastHiddenProposer):
        def propose(self, *given: Any) -> Proposal:
            found = super().propose(*given)
            return found if found.probabilities is None else evolve(found, probabilities=found.probabilities.log())


class StopsAtUnlikelyTokens(_Decoding):
    """ends a proposal because of the token that it drew"""

    class wrong(LastHiddenProposer):
        def propose(self, *given: Any) -> Proposal:
            found = super().propose(*given)
            if found.probabilities is None:
                return found
            q_BK = found.probabilities.gather(2, found.tokens[..., None])[..., 0]
            length_B = (q_BK > 0.02).long().cumprod(1).sum(1)
            return evolve(found, lengths=torch.minimum(found.lengths, length_B))


class ReadsPaddingOfPrompts(_Decoding):
    """reads the end of a padded prompt"""

    class wrong(LastHiddenProposer):
        def start(self, slots: Tensor, ids: Tensor, lengths: Tensor, first: Tensor, features: Tensor) -> None:
            super().start(slots, ids, torch.full_like(lengths, ids.shape[1]), first, features)


class RemembersASlot(_Decoding):
    """remembers what a slot held before"""

    class wrong(LastHiddenProposer):
        def start(self, slots: Tensor, ids: Tensor, lengths: Tensor, first: Tensor, features: Tensor) -> None:
            before_BH = self.last_SH[slots].clone()
            super().start(slots, ids, lengths, first, features)
            self.last_SH[slots] += 0.5 * before_BH


class ForgetsTheSoftCap(_Decoding):
    """proposes from logits without the target's soft cap"""

    class wrong(LastHiddenProposer):
        def propose(self, *given: Any) -> Proposal:
            kept = self.draft.architecture
            self.draft.architecture = evolve(kept, logit_softcap=None)
            found = super().propose(*given)
            self.draft.architecture = kept
            return found


class OpensEightSlots(_Decoding):
    """opens eight slots, whatever is asked"""

    class wrong(LastHiddenProposer):
        def open_slots(self, num_slots: int, max_length: int) -> None:
            super().open_slots(8, max_length)


class OpensSlotsOnce(_Decoding):
    """keeps its slots when they are opened again"""

    class wrong(LastHiddenProposer):
        def open_slots(self, num_slots: int, max_length: int) -> None:
            if not hasattr(self, "last_SH"):
                super().open_slots(num_slots, max_length)


@frozen
class Caught:
    """A wrong draft, the test of the suite that has to fail, and a word of what it has seen."""

    wrong: type[LastHiddenDraft]
    test: str
    word: str


# The first of them are tested by default.
CAUGHT = (
    Caught(WrongShape, "rows_keep_their_form", "weight"),
    Caught(LabelsOffByOne, "labels_are_the_tokens_that_the_target_judges", "label"),
    Caught(LeaksInAPackedRow, "packed_rows_are_as_alone", "share a row"),
    Caught(TooManyTokens, "limits_are_kept", "limit"),
    Caught(WrongLength, "neighbours_do_not_matter", "`block`"),
    Caught(Exits, "rows_keep_their_form", "SystemExit"),
    Caught(LabelsAloneOffByOne, "labels_are_the_tokens_that_the_target_judges", "in no text"),
    Caught(UnsortedBlocks, "rows_keep_their_form", "block"),
    Caught(InterleavedSlots, "rows_keep_their_form", "block"),
    Caught(IgnoresSlots, "rows_keep_their_form", "slot"),
    Caught(SlotsFromBehind, "slots_are_places_in_the_block", "begins at"),
    Caught(TargetsOffByOne, "labels_are_the_tokens_that_the_target_judges", "label"),
    Caught(LeaksBetweenTexts, "neighbours_do_not_matter", "beside the text alone"),
    Caught(ChangesUnderPadding, "padding_does_not_matter", "padding"),
    Caught(CountsPositionsInTheRow, "packed_rows_are_as_alone", "share a row"),
    Caught(Dropout, "forward_draws_nothing", "random numbers"),
    Caught(PreparesByChance, "preparation_follows_its_generator", "random numbers"),
    Caught(TrainsTheHead, "the_targets_weights_stay", "trained"),
    Caught(IdleWeight, "gradients_do_not_depend_on_the_batch", "idle"),
    Caught(OutsideStateDict, "a_checkpoint_is_the_same_draft", "state_dict"),
    Caught(SaysOtherTaps, "it_describes_itself", "taps"),
    Caught(OtherFeatures, "decoding_sees_what_training_sees", "probabilities"),
    Caught(ForgetsTheSoftCap, "decoding_sees_what_training_sees", "probabilities"),
    Caught(ForgetsACommittedToken, "committed_tokens_are_the_text", "commits"),
    Caught(DrawsItsOwn, "random_numbers_are_the_engines", "random numbers"),
    Caught(CountsRowsForSlots, "slots_do_not_see_each_other", "slot"),
    Caught(NeighboursInABatch, "slots_do_not_see_each_other", "slot"),
    Caught(Logarithms, "proposals_can_be_verified", "probabilities"),
    Caught(StopsAtUnlikelyTokens, "a_token_does_not_decide_whether_it_is_proposed", "drawn"),
    Caught(ReadsPaddingOfPrompts, "padding_of_prompts_does_not_count", "padding"),
    Caught(OpensEightSlots, "slots_are_opened_as_asked", "out of bounds"),
    Caught(OpensSlotsOnce, "slots_are_opened_as_asked", "out of bounds"),
    Caught(RemembersASlot, "a_used_slot_is_new", "another text"),
)
