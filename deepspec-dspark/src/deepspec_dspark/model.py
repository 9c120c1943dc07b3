"""The DSpark draft: DFlash, a Markov head that corrects its logits, a confidence head that judges its slots.

Everything else - blocks, backbone, rows, checkpoints - is the base class.

Legend: N live blocks, K predictions of a block, R rows, H hidden size, r rank of the correction, B slots decoding.
"""

from __future__ import annotations

from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.draft import DraftBatch, DraftDescription
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.layers.decoder_layer import initialise
from deepspec_dflash.model import DFlashModel
from deepspec_dspark.heads import ConfidenceHead, MarkovHead, new_markov_head
from deepspec_dspark.options import DSparkOptions
from deepspec_dspark.proposer import DSparkProposer
from deepspec_dspark.tree import DSparkTreeProposer


class DSparkModel(DFlashModel):
    """A contracts.draft.DraftModel with new weights; `taps` are the target layers its features come from."""

    algorithm = "dspark"
    options: DSparkOptions

    def __init__(self, options: DSparkOptions, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
        super().__init__(options, adapter, taps)
        architecture, markov = adapter.architecture, options.markov
        self.markov_head: MarkovHead | None = None
        if markov.rank:
            self.markov_head = new_markov_head(
                markov.head,
                vocab_size=architecture.vocab_size,
                head_rows=self.head_rows,
                hidden_size=architecture.hidden_size,
                rank=markov.rank,
                std=architecture.initializer_range,
            )
        self.confidence_head: ConfidenceHead | None = None
        if options.confidence_head:
            self.confidence_head = ConfidenceHead(
                architecture.hidden_size + (markov.rank if options.confidence_with_markov else 0),
                stop_gradient=options.confidence_gradient == "stop",
            )
            initialise(self.confidence_head, architecture.initializer_range)

    def rows(self, batch: DraftBatch, hidden_NKH: Tensor) -> Rows:
        """DFlash's rows with a correction and `confidence_logits`, given the true token before every slot."""
        rows, prepared = super().rows(batch, hidden_NKH), batch.prepared
        sequence_N1, anchors_N1 = prepared["sequence"][:, None], prepared["anchors"][:, None]
        positions_NK = anchors_N1 + torch.arange(hidden_NKH.shape[1], device=anchors_N1.device)
        # Slots past the end are no rows.
        previous_NK = batch.input_ids[sequence_N1, positions_NK.clamp(max=batch.input_ids.shape[1] - 1)]
        embedded_NKr = self.embed_previous(previous_NK)
        if self.markov_head is not None:
            assert embedded_NKr is not None
            rows = evolve(rows, correction=self.markov_head(hidden_NKH, embedded_NKr)[rows.block, rows.slot])
        confidence_NK = self.confidence(hidden_NKH, embedded_NKr)
        if confidence_NK is not None:
            rows = evolve(rows, extras={**rows.extras, "confidence_logits": confidence_NK[rows.block, rows.slot]})
        return rows

    def embed_previous(self, previous: Tensor) -> Tensor | None:
        """W1 of the tokens before slots, [...] -> [..., r]; None without a Markov head."""
        if self.markov_head is None:
            return None
        embedded_r: Tensor = self.markov_head.markov_w1(previous)
        return embedded_r

    def confidence(self, hidden_H: Tensor, embedded_r: Tensor | None) -> Tensor | None:
        """Survival logits, [..., H] and [..., r] -> [...]; None without a confidence head."""
        if self.confidence_head is None:
            return None
        features_F = hidden_H
        if self.options.confidence_with_markov:
            assert embedded_r is not None
            features_F = torch.cat([hidden_H, embedded_r], dim=-1)
        confidence: Tensor = self.confidence_head(features_F)
        return confidence

    def heads(self) -> Heads:
        """The frozen projection, and the correction's, which is trained."""
        heads = super().heads()
        return heads if self.markov_head is None else evolve(heads, correction=self.markov_head.markov_w2.weight)

    def proposer(self) -> DSparkProposer:
        """The decoding side, sharing these weights."""
        return DSparkProposer(self)

    def tree_proposer(self, nodes: int) -> DSparkTreeProposer:
        """The same with trees."""
        return DSparkTreeProposer(self, nodes)

    def describe(self) -> DraftDescription:
        """Facts for checkpoints, exports and reports."""
        unread = ["confidence_gradient"]
        if not self.options.markov.rank:
            unread.append("markov.head")
        if self.confidence_head is None:
            unread.append("confidence_with_markov")
        return evolve(
            super().describe(), gives_confidence=self.confidence_head is not None, unread_options=tuple(unread)
        )

    def config(self) -> dict[str, Any]:
        """What is added to config.json."""
        markov, confidence_head = self.options.markov, self.options.confidence_head
        config = {**super().config(), "markov_rank": markov.rank, "enable_confidence_head": confidence_head}
        if markov.rank:
            config["markov_head_type"] = markov.head
        if confidence_head:
            config["confidence_head_with_markov"] = self.options.confidence_with_markov
        return config
