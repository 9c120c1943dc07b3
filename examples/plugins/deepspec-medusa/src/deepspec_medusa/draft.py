"""Medusa-1 heads (arXiv 2401.10774, section 2.1): the network, its training rows and its description.

From the target's last hidden state at position p - 1, the target's lm_head predicts the token at p, the anchor. Head k
predicts the token at p + 1 + k from the same state. Does not know any family, or how proposals are made.

Legend: N anchors, K heads, H hidden size, V vocabulary, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec_core.contracts.draft import DraftBatch, DraftDescription, DraftModel
from deepspec_core.contracts.proposer import Proposer
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.layers.softcap import softcapped
from deepspec_core.preparation.anchors import AnchorPreparation, anchored_rows
from deepspec_medusa.options import MedusaOptions
from deepspec_medusa.proposer import MedusaProposer, MedusaTreeProposer


class MedusaDraft(DraftModel):
    """A contracts.draft.DraftModel. It begins as K copies of the target's lm_head.

    Tapped layers are not read. A run may have some, so that other drafts can share its cache.
    """

    def __init__(self, options: MedusaOptions, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
        super().__init__()
        architecture = adapter.architecture
        self.options, self.taps, self.softcap = options, taps, architecture.logit_softcap
        self.class_name = f"{adapter.class_prefix}MedusaModel"
        size, vocabulary, heads = architecture.hidden_size, architecture.vocab_size, options.num_heads
        self.embed_tokens = adapter.embedding().requires_grad_(False)
        self.lm_head = nn.Linear(size, vocabulary, bias=False).requires_grad_(False)
        # In blocks of zeros SiLU(0) = 0, so each head's first logits are the target's for the anchor.
        self.blocks_KHH = nn.Parameter(torch.zeros(heads, size, size))
        self.biases_KH = nn.Parameter(torch.zeros(heads, size))
        self.heads_KVH = nn.Parameter(torch.zeros(heads, vocabulary, size))
        # The first token of a text has no hidden state before it.
        self.preparation = AnchorPreparation(num_predictions=heads, num_anchors=options.num_anchors, first=1)

    def adopt(self, embedding_VH: Tensor, head_VH: Tensor) -> None:
        """The target's lm_head is what each head begins with."""
        super().adopt(embedding_VH, head_VH)
        with torch.no_grad():
            self.heads_KVH.copy_(head_VH)

    def hidden(self, last_NH: Tensor) -> Tensor:
        """Inputs of the heads [N, K, H]: x + SiLU(W_k x + b_k)."""
        last_NH = last_NH.to(self.biases_KH.dtype)
        return last_NH[:, None] + nn.functional.silu(
            torch.einsum("nh,kgh->nkg", last_NH, self.blocks_KHH) + self.biases_KH
        )

    def logits(self, hidden_NKH: Tensor) -> Tensor:
        """[N, K, V]"""
        return softcapped(torch.einsum("nkh,kvh->nkv", hidden_NKH, self.heads_KVH), self.softcap)

    def forward(self, batch: DraftBatch) -> Rows:
        """A row for each head at each drawn anchor, where its token counts."""
        # A batch without anchors has one block at position 0, of which no row counts.
        before_N = (batch.prepared["anchors"] - 1).clamp(min=0)
        return anchored_rows(batch, self.hidden(batch.features.last_hidden[batch.prepared["sequence"], before_N]))

    def heads(self) -> Heads:
        """A head for each slot, and the target's."""
        return Heads(draft=self.heads_KVH, target=self.lm_head.weight, softcap=self.softcap)

    def proposer(self) -> Proposer:
        """Chains."""
        return MedusaProposer(self)

    def tree_proposer(self, nodes: int) -> Proposer:
        """Trees."""
        return MedusaTreeProposer(self, nodes)

    def describe(self) -> DraftDescription:
        """Facts."""
        options = self.options
        return DraftDescription(
            algorithm="medusa",
            class_name=self.class_name,
            taps=self.taps,
            max_tokens=options.num_heads,
            num_layers=1,
            anchor_predicts=True,
            causal=True,
            gives_confidence=False,
            training_keys=("num_anchors",),
            weight_names={
                "blocks_KHH": "blocks.weight",
                "biases_KH": "blocks.bias",
                "heads_KVH": "heads.weight",
            },
            config={
                "medusa_num_heads": options.num_heads,
                "num_anchors": options.num_anchors,
                "target_layer_ids": list(self.taps),
            },
        )
