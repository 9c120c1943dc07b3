"""The DFlash 2 draft: DFlash with convolutions around its sublayers, and a selector that chooses among candidates.

Blocks, backbone and the base loss's rows are DFlash's.

Legend: N live blocks, K predictions of a block, R rows, B slots in a call, W nodes of a level, H hidden size,
C candidates, D the draft's vocabulary, V the target's.
"""

from __future__ import annotations

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
from deepspec_dflash2.convolution import BlockConvolution
from deepspec_dflash2.options import CLASS, KEYS, DFlash2Options
from deepspec_dflash2.proposer import DFlash2Proposer, DFlash2TreeProposer
from deepspec_dflash2.selector import CandidateSelector, best_columns, logits_at


class DFlash2Draft(DFlashModel):
    """A contracts.draft.DraftModel. New, it computes what a DFlash draft with the same weights does."""

    algorithm, class_suffix = "dflash2", CLASS
    options: DFlash2Options

    def __init__(self, options: DFlash2Options, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
        super().__init__(options, adapter, taps)
        self.class_name, architecture = CLASS, adapter.architecture
        size, taps_of_kernel, group = architecture.hidden_size, options.conv_kernel_size, options.conv_group_size
        self.vocab_size, self.candidate_selector = architecture.vocab_size, None
        if taps_of_kernel and size % group:
            problem = "the channels cannot be divided into groups of this size"
            raise ConfigError(problem, where="[draft] conv_group_size", found=group, expected=f"a divisor of {size}")
        for layer in self.backbone.draft_layers() if taps_of_kernel else ():
            layer.around_attention = BlockConvolution(size, taps=taps_of_kernel, group=group)
            layer.around_mlp = BlockConvolution(size, taps=taps_of_kernel, group=group)
        if options.selector_top_k:
            sizes = (size, self.vocab_size, options.selector_rank)
            self.candidate_selector = CandidateSelector(*sizes, std=architecture.initializer_range)

    def rows(self, batch: DraftBatch, hidden_NKH: Tensor) -> Rows:
        """DFlash's rows with the tokens and scores of candidates, given the true token before each."""
        rows, prepared = super().rows(batch, hidden_NKH), batch.prepared
        if self.candidate_selector is None:
            return rows
        best_RC = best_columns(rows.hidden, self.lm_head, self.num_candidates)
        columns_RC = with_labels(best_RC, self.columns(prepared["labels"]))
        logits_RC = softcapped(logits_at(columns_RC, rows.hidden, self.lm_head.weight), self.softcap)
        sequence_R, position_R = prepared["sequence"][rows.block], prepared["anchors"][rows.block] + rows.slot
        tokens_RC, previous_R = self.tokens(columns_RC), batch.input_ids[sequence_R, position_R]
        scores_RC = self.candidate_selector(logits_RC, tokens_RC, rows.hidden, previous_R)
        return evolve(rows, extras={**rows.extras, "selector_scores": scores_RC, "selector_tokens": tokens_RC})

    def walk(self, hidden_BKH: Tensor) -> Callable[[int, Tensor], Tensor]:
        """given(slot, previous): logits [B, W, V] of the slot's token after the tokens previous [B, W].

        They are the selector's scores of the candidates, and -inf for all other tokens; without a selector, the head's.
        """
        logits_BKD, selector = self.known_logits(hidden_BKH), self.candidate_selector
        logits_BKC, columns_BKC = logits_BKD.topk(self.num_candidates)
        tokens_BKC = self.tokens(columns_BKC)

        def given(slot: int, previous_BW: Tensor) -> Tensor:
            at = slice(slot, slot + 1)
            if selector is None:
                return self.spread(logits_BKD[:, at]).expand(-1, previous_BW.shape[1], -1)
            scores_BWC = selector(logits_BKC[:, at], tokens_BKC[:, at], hidden_BKH[:, at], previous_BW)
            none_BWV = scores_BWC.new_full((*previous_BW.shape, self.vocab_size), -torch.inf)
            return none_BWV.scatter(-1, tokens_BKC[:, at].expand_as(scores_BWC), scores_BWC)

        return given

    @property
    def num_candidates(self) -> int:
        """How many tokens of a slot the selector chooses from."""
        return min(self.options.selector_top_k, self.head_rows)

    def tokens(self, columns: Tensor) -> Tensor:
        """The target's tokens of columns of the head."""
        return columns if self.vocabulary is None else self.vocabulary.ids[columns]

    def columns(self, tokens: Tensor) -> Tensor:
        """The columns of tokens; -1 for those that the draft does not know."""
        if self.vocabulary is None:
            return tokens
        found = torch.searchsorted(self.vocabulary.ids, tokens).clamp(max=self.head_rows - 1)
        return torch.where(self.vocabulary.ids[found] == tokens, found, -1)

    def proposer(self) -> DFlash2Proposer:
        """Chains."""
        return DFlash2Proposer(self)

    def tree_proposer(self, nodes: int) -> DFlash2TreeProposer:
        """Trees."""
        return DFlash2TreeProposer(self, nodes)

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


def with_labels(columns_RC: Tensor, labels_R: Tensor) -> Tensor:
    """The candidates, with the label in place of the least probable one where it is missing. A label of -1 is none."""
    missing_R = (columns_RC != labels_R[:, None]).all(-1) & (labels_R >= 0)
    last_R = torch.where(missing_R, labels_R, columns_RC[:, -1])
    return torch.cat([columns_RC[:, :-1], last_R[:, None]], dim=-1)
