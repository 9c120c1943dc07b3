"""Eagle3 as core sees it: sequences to supervised rows over all steps of test-time training.

Knows how steps follow each other, how documents lie in a batch, and the facts a checkpoint states; the network is
drafter.py's, the attention pattern attention.py's, what counts is preparation.py's.

Legend: B sequences, T tokens, M documents, N indices later steps run over, R rows, P distinct target positions,
C = taps * H, H hidden size, V the target's vocabulary, D the draft's, h query heads, G kv heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch.nn import functional as F

from deepspec_core.contracts.draft import DraftBatch, DraftDescription, DraftModel
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.layers.decoder_layer import initialise
from deepspec_core.layers.draft_vocabulary import KEY, DraftVocabulary
from deepspec_core.layers.softcap import softcapped
from deepspec_core.layers.window import window_of_layers
from deepspec_eagle3.attention import KeysValues, StepLayout, attend_first, attend_later
from deepspec_eagle3.drafter import Eagle3Drafter
from deepspec_eagle3.options import Eagle3Options
from deepspec_eagle3.preparation import StepPreparation
from deepspec_eagle3.proposer import Eagle3Proposer


class Eagle3Model(DraftModel):
    """A contracts.draft.DraftModel with new weights; `taps` are the target layers its features come from."""

    algorithm = "eagle3"
    class_suffix = "Eagle3Model"

    def __init__(self, options: Eagle3Options, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
        super().__init__()
        architecture = adapter.architecture
        self.options = evolve(
            options, target_name=architecture.name if options.target_name is None else options.target_name
        )
        self.taps = tuple(sorted(taps))
        self.class_name = adapter.class_prefix + self.class_suffix
        self.num_target_layers = architecture.num_layers
        self.softcap, self.target_softcap = architecture.draft_softcap, architecture.logit_softcap
        self.embed_tokens = adapter.embedding().requires_grad_(False)
        if options.vocab_size is not None:
            self.vocabulary = DraftVocabulary(options.vocab_size, architecture)
        head_rows = options.vocab_size or architecture.vocab_size
        self.lm_head = nn.Linear(architecture.hidden_size, head_rows, bias=False).requires_grad_(False)
        initialise(self.lm_head, architecture.initializer_range)
        self.drafter = Eagle3Drafter(
            adapter, num_layers=options.num_layers, num_taps=len(taps), qk_norm=options.qk_norm
        )
        self.window = window_of_layers(
            self.drafter.draft_layers(), least=options.ttt_length, because="[draft] ttt_length"
        )
        self.preparation = StepPreparation(
            num_steps=options.ttt_length,
            step_decay=options.step_decay,
            normaliser=options.normaliser,
            count=options.count,
            num_anchors=options.num_anchors,
        )

    def forward(self, batch: DraftBatch) -> Rows:
        """The supervised predictions of a batch, index by index and step by step.

        The sum of weight * term over the denominator is sum_s step_decay ** s * (step s's loss).
        """
        prepared, places = batch.prepared, Places.of(batch, self.window)
        state0_BTH, later = self.unroll(batch, places)
        num_places, num_later = batch.input_ids.numel(), len(prepared["later_index"])
        state = torch.cat([state0_BTH.flatten(0, 1), *later])
        at_R = torch.where(
            prepared["step"] == 0,
            places.start_M[prepared["document"]] + prepared["index"],
            num_places + (prepared["step"] - 1) * num_later + prepared["later"],
        )
        target_P = places.start_M[prepared["target_document"]] + prepared["target_position"]
        divisor = len(prepared["lengths"]) if self.options.normaliser == "sequence" else num_places
        denominator = torch.full((), divisor, dtype=torch.float32, device=at_R.device)
        return Rows(
            hidden=self.drafter.norm(state.index_select(0, at_R)),
            target_hidden=batch.features.last_hidden.flatten(0, 1).index_select(0, target_P),
            target_index=prepared["target_index"],
            weight=prepared["weight"],
            slot=prepared["step"],
            block=prepared["block"],
            denominator=denominator,
            on_host=(*batch.on_host, (denominator, torch.full((), divisor, dtype=torch.float32))),
        )

    def unroll(self, batch: DraftBatch, places: Places) -> tuple[Tensor, list[Tensor]]:
        """Each step's output before the final norm: step 0 over whole sequences, [B, T, H]; later steps, [N, H] each,
        over the indices that `prepared` lists, none where it lists none.

        Defined at index q of step s where q + s + 1 is still inside q's document; other places are not seen from there.
        """
        # What stands past a sequence's end is undefined, and 0 * inf in a masked sum is not 0.
        features_BTC = batch.features.hidden.masked_fill(~batch.attention_mask.bool()[..., None], 0.0)
        hidden_BTH = self.drafter.project(features_BTC)
        scales = [layer.attention.scale for layer in self.drafter.draft_layers()]
        held: list[list[KeysValues]] = [[] for _ in scales]

        def attend_step0(layer: int, queries_BhTD: Tensor, keys_BGTD: Tensor, values_BGTD: Tensor) -> Tensor:
            held[layer].append((keys_BGTD, values_BGTD))
            return attend_first(queries_BhTD, held[layer][0], places.layout, scale=scales[layer])[0]

        def attend_step(layer: int, queries_1hND: Tensor, keys_1GND: Tensor, values_1GND: Tensor) -> Tensor:
            held[layer].append((keys_1GND[0], values_1GND[0]))
            first, *later = held[layer]
            return attend_later(queries_1hND[0], first, later, at_N, places.layout, scale=scales[layer])[None]

        embedded_BTH = self.embed_tokens(shifted(batch.input_ids, 1))
        rotary = self.drafter.rotary(hidden_BTH, places.position_BT)
        state0_BTH = self.drafter(hidden_BTH, embedded_BTH, rotary, attend_step0)
        at_N = places.start_M[batch.prepared["later_document"]] + batch.prepared["later_index"]
        if not len(at_N):
            return state0_BTH, []
        position_1N = places.position_BT.expand_as(batch.input_ids).flatten()[None, at_N]
        hidden_1NH = state0_BTH.flatten(0, 1).index_select(0, at_N)[None]
        later = []
        for step in range(1, self.options.ttt_length):
            embedded_1NH = self.embed_tokens(shifted(batch.input_ids, step + 1).flatten()[None, at_N])
            rotary = self.drafter.rotary(hidden_1NH, position_1N + step)
            hidden_1NH = self.drafter(hidden_1NH, embedded_1NH, rotary, attend_step)
            later.append(hidden_1NH[0])
        return state0_BTH, later

    def logits(self, hidden_H: Tensor) -> Tensor:
        """softcap(lm_head(h)) of normed outputs, [..., H] -> [..., V]; -inf for tokens that the draft does not know."""
        return self.spread(softcapped(self.lm_head(hidden_H), self.softcap))

    def heads(self) -> Heads:
        """One frozen projection for draft and target; of a reduced vocabulary, some of its rows for the draft."""
        return evolve(self.shared_heads(softcap=self.softcap), target_softcap=self.target_softcap)

    def proposer(self) -> Eagle3Proposer:
        """The decoding side, sharing these weights."""
        return Eagle3Proposer(self)

    def describe(self) -> DraftDescription:
        """Facts for checkpoints, exports and reports."""
        return DraftDescription(
            algorithm=self.algorithm,
            class_name=self.class_name,
            taps=self.taps,
            max_tokens=self.options.ttt_length,
            num_layers=self.options.num_layers,
            anchor_predicts=True,
            causal=True,
            weight_names={**self.drafter.names("drafter"), "vocabulary.ids": KEY},
            config=self.config(),
            window=self.window,
            gives_confidence=False,
            unread_options=("normaliser", "count", "num_anchors"),
        )

    def config(self) -> dict[str, Any]:
        """What is added to config.json."""
        published = {
            "target_layer_ids": list(self.taps),
            "num_target_layers": self.num_target_layers,
            "ttt_length": self.options.ttt_length,
            "step_loss_decay": self.options.step_decay,
            "draft_num_hidden_layers": self.options.num_layers,
            "target_model_name_or_path": self.options.target_name,
        }
        if self.options.vocab_size is not None:
            published["draft_vocab_size"] = self.options.vocab_size
        return published if self.options.qk_norm else published | {"qk_norm": False}


@frozen(kw_only=True, eq=False)
class Places:
    """Where the documents of a batch lie.

    start_M: their first places in the flattened batch, in the order of their samples. position_BT ([1, T] where all
    rows begin at 0): positions inside documents.
    """

    start_M: Tensor
    position_BT: Tensor
    layout: StepLayout

    @classmethod
    def of(cls, batch: DraftBatch, window: int | None = None) -> Places:
        """One document a row, or, with document_ids, consecutive documents in the order of their samples."""
        batch_size, num_tokens = batch.input_ids.shape
        index_T = torch.arange(num_tokens, device=batch.input_ids.device)
        if batch.document_ids is None:
            start_M = torch.arange(batch_size, device=index_T.device) * num_tokens
            return cls(start_M=start_M, position_BT=index_T[None], layout=StepLayout(window=window))
        real_BT = batch.attention_mask.bool()
        ids_BT = batch.document_ids.masked_fill(~real_BT, -1)
        begins_BT = F.pad(ids_BT[:, 1:] != ids_BT[:, :-1], (1, 0), value=True)
        first_BT = torch.where(begins_BT, index_T, 0).cummax(dim=1).values
        # Counted and scattered rather than listed by nonzero, which would wait for the device.
        opens = (begins_BT & real_BT).flatten()
        num_documents = len(batch.prepared["lengths"])
        slot = torch.where(opens, opens.cumsum(0) - 1, num_documents)
        start_M1 = torch.zeros(num_documents + 1, dtype=torch.long, device=index_T.device)
        start_M1.scatter_(0, slot, torch.arange(len(opens), device=index_T.device))
        position_BT = index_T - first_BT if batch.position_ids is None else batch.position_ids
        return cls(start_M=start_M1[:-1], position_BT=position_BT, layout=StepLayout(first_BT, window))


def shifted(ids_BT: Tensor, by: int) -> Tensor:
    """Index q holds ids[q + by], 0 past the end."""
    return F.pad(ids_BT[:, by:], (0, min(by, ids_BT.shape[1])))
