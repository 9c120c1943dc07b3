"""The DFlash 2 draft: DFlash with convolutions around its sublayers, and a selector that chooses among candidates.

Blocks, backbone and the rows of the base loss are those of DFlash. Does not know how a proposal is drawn.

Legend: N live blocks, K predictions of a block, R rows, B slots in a call, W nodes of a level, H hidden size,
C candidates, V the target's vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.draft import DraftBatch, DraftDescription
from deepspec_core.contracts.rows import Rows
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.errors import ConfigError
from deepspec_core.layers.softcap import softcapped
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.proposer import DFlashProposer
from deepspec_dflash.tree import DFlashTreeProposer
from deepspec_dflash2.convolution import BlockConvolution
from deepspec_dflash2.options import CLASS, KEYS, DFlash2Options
from deepspec_dflash2.proposer import DFlash2Proposer, DFlash2TreeProposer
from deepspec_dflash2.selector import CandidateSelector, candidates, logits_at


class DFlash2Draft(DFlashModel):
    """A contracts.draft.DraftModel. Before training, it computes the same as a DFlash draft with the same weights."""

    algorithm, class_suffix = "dflash2", CLASS
    options: DFlash2Options

    def __init__(self, options: DFlash2Options, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
        super().__init__(options, adapter, taps)
        self.class_name, architecture = CLASS, adapter.architecture
        size, taps_of_kernel, group = architecture.hidden_size, options.conv_kernel_size, options.conv_group_size
        self.vocab_size = architecture.vocab_size
        self.candidate_selector: CandidateSelector | None = None
        # Of a reduced vocabulary there may be no more.
        self.num_candidates = min(options.selector_top_k, self.head_rows)
        if taps_of_kernel and size % group:
            problem = "the channels cannot be divided into groups of this size"
            raise ConfigError(problem, where="[draft] conv_group_size", found=group, expected=f"a divisor of {size}")
        for layer in self.backbone.draft_layers() if taps_of_kernel else ():
            layer.around_attention = BlockConvolution(size, taps=taps_of_kernel, group=group)
            layer.around_mlp = BlockConvolution(size, taps=taps_of_kernel, group=group)
        if options.selector_top_k:
            self.candidate_selector = CandidateSelector(architecture, options.selector_rank)

    def rows(self, batch: DraftBatch, hidden_NKH: Tensor) -> Rows:
        """DFlash's rows with the tokens and scores of candidates, given the true token before each."""
        rows, prepared = super().rows(batch, hidden_NKH), batch.prepared
        if self.candidate_selector is None:
            return rows
        tokens_RC = candidates(rows.hidden, prepared["labels"], self.logits, self.num_candidates, self.vocab_size)
        logits_RC = softcapped(logits_at(tokens_RC, rows.hidden, self.heads().target), self.softcap)
        previous_R = batch.input_ids[prepared["sequence"][rows.block], prepared["anchors"][rows.block] + rows.slot]
        scores_RC = self.candidate_selector(logits_RC, tokens_RC, rows.hidden, previous_R)
        return evolve(rows, extras={**rows.extras, "selector_scores": scores_RC, "selector_tokens": tokens_RC})

    def walk(self, hidden_BKH: Tensor) -> Callable[[int, Tensor], Tensor]:
        """given(slot, previous): logits [B, W, V] of the slot's token after the tokens previous [B, W].

        They are the selector's scores of the candidates, and -inf for all other tokens.
        """
        logits_BKC, tokens_BKC = self.logits(hidden_BKH).topk(self.num_candidates)

        def given(slot: int, previous_BW: Tensor) -> Tensor:
            at, selector = slice(slot, slot + 1), self.candidate_selector
            scores_BWC = selector(logits_BKC[:, at], tokens_BKC[:, at], hidden_BKH[:, at], previous_BW)
            none_BWV = scores_BWC.new_full((*previous_BW.shape, self.vocab_size), -torch.inf)
            return none_BWV.scatter(-1, tokens_BKC[:, at].expand_as(scores_BWC), scores_BWC)

        return given

    def proposer(self) -> DFlashProposer:
        """Chains; without a selector, DFlash's."""
        return DFlash2Proposer(self) if self.candidate_selector else super().proposer()

    def tree_proposer(self, nodes: int) -> DFlashTreeProposer:
        """Trees; without a selector, DFlash's."""
        return DFlash2TreeProposer(self, nodes) if self.candidate_selector else super().tree_proposer(nodes)

    def describe(self) -> DraftDescription:
        """Facts, with the published names of the convolutions."""
        said, names = super().describe(), {}
        for index in range(self.options.num_layers):
            for part in ("attention", "mlp"):
                names[f"backbone.layers.{index}.around_{part}"] = f"layers.{index}.{part}_conv"
        return evolve(said, weight_names={**said.weight_names, **names})

    def config(self) -> dict[str, Any]:
        """What is added to config.json: `dflash_config`, and what training and a reduced vocabulary say beside it."""
        base = super().config()
        own = {name: base[name] for name in ("block_size", "mask_token_id", "target_layer_ids")}
        beside = ("num_target_layers", "num_anchors", "sample_from_anchor", "draft_vocab_size")
        own |= {name: getattr(self.options, name) for name in KEYS}
        return {"dflash_config": own, **{name: base[name] for name in beside if name in base}}
