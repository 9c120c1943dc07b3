"""The DFlash draft: training blocks through the backbone to rows, and the facts its checkpoints state.

`forward` is pure: which blocks and slots there are was decided by grid.GridPreparation. Drafts that add heads
to the same backbone subclass DFlashModel, extend `rows`, and say so in `config` and their description.

Legend: B sequences or packed rows, T tokens, C = taps * H, H hidden size, V the target's vocabulary, D the draft's,
N live blocks, S slots of a block, K predictions of a block (S, or S - 1 where the anchor's slot predicts nothing),
R rows, P distinct target positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from deepspec_core.contracts.draft import DraftBatch, DraftDescription, DraftModel
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.errors import ConfigError
from deepspec_core.layers.draft_vocabulary import KEY, DraftVocabulary
from deepspec_core.layers.softcap import softcapped
from deepspec_core.layers.window import window_of_layers
from deepspec_core.preparation.anchors import anchored_rows
from deepspec_dflash.attention import BlockLayout, KeysValues
from deepspec_dflash.backbone import DFlashBackbone
from deepspec_dflash.grid import GridPreparation
from deepspec_dflash.options import DFlashOptions
from deepspec_dflash.proposer import DFlashProposer
from deepspec_dflash.tree import DFlashTreeProposer

__all__ = ["DFlashModel"]


class DFlashModel(DraftModel):
    """A contracts.draft.DraftModel with new weights; `taps` are the target layers its features come from."""

    algorithm = "dflash"
    class_suffix = "DSparkModel"

    def __init__(self, options: DFlashOptions, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
        super().__init__()
        architecture = adapter.architecture
        self.options = evolve(options, mask_token_id=_mask_token(options, adapter))
        self.taps = tuple(sorted(taps))
        self.class_name = adapter.class_prefix + self.class_suffix
        self.num_target_layers = architecture.num_layers
        self.softcap, self.target_softcap = architecture.draft_softcap, architecture.logit_softcap
        self.embed_tokens = adapter.embedding().requires_grad_(False)
        if options.vocab_size is not None:
            self.vocabulary = DraftVocabulary(options.vocab_size, architecture)
        self.head_rows = options.vocab_size or architecture.vocab_size
        self.lm_head = nn.Linear(architecture.hidden_size, self.head_rows, bias=False).requires_grad_(False)
        self.backbone = DFlashBackbone(adapter, num_layers=options.num_layers, num_taps=len(taps))
        self.window = window_of_layers(
            self.backbone.draft_layers(), least=options.block_size, because="[draft] block_size"
        )
        self.preparation = GridPreparation(num_predictions=options.num_predictions, num_anchors=options.num_anchors)

    def forward(self, batch: DraftBatch) -> Rows:
        """The supervised slots of a batch."""
        return self.rows(batch, self.block_hidden(batch))

    def block_hidden(self, batch: DraftBatch) -> Tensor:
        """The backbone's output at every live block's predicting slots, [N, K, H]."""
        prepared, num_tokens = batch.prepared, batch.input_ids.shape[1]
        # What stands past a sequence's end is undefined, and 0 * inf in a masked sum is not 0.
        features_BTC = batch.features.hidden.masked_fill(~batch.attention_mask.bool()[..., None], 0.0)
        positions_BT = batch.position_ids
        if positions_BT is None:
            positions_BT = torch.arange(num_tokens, device=batch.input_ids.device)[None]
        context = self.backbone.context_keys_values(self.backbone.context(features_BTC), positions_BT)
        layout = BlockLayout(
            grid_BA=prepared["grid"],
            grid_anchors_BA=prepared["grid_anchors"],
            place_N=prepared["place"],
            block_size=self.options.block_size,
            window=self.window,
            grid_begins_BA=prepared.get("grid_begins"),
        )
        columns_N = prepared["anchors"]
        anchor_ids_N = batch.input_ids[prepared["sequence"], columns_N]
        anchors_N = columns_N - prepared["begins"] if "begins" in prepared else columns_N
        return self.run_blocks(anchor_ids_N, anchors_N, context, layout)

    def rows(self, batch: DraftBatch, hidden_NKH: Tensor) -> Rows:
        """Counted slots only, each with weight 1; how slots of a block weigh is the run's weighting."""
        return anchored_rows(batch, hidden_NKH)

    def run_blocks(
        self, anchor_ids_N: Tensor, anchors_N: Tensor, context: Sequence[KeysValues], layout: BlockLayout
    ) -> Tensor:
        """[anchor, MASK, MASK, ...] at positions anchor, anchor + 1, ... through the backbone, [N, K, H]: the output at
        the slots that predict."""
        ids_NS = anchor_ids_N.new_full((len(anchor_ids_N), self.options.block_size), self.mask_token_id)
        ids_NS[:, 0] = anchor_ids_N
        positions_NS = anchors_N[:, None] + torch.arange(self.options.block_size, device=anchors_N.device)
        # The embedding is the target's, and may be in fewer bits than the residual stream of the draft.
        embedded_NSH = self.embed_tokens(ids_NS).to(self.backbone.fc.weight.dtype)
        output_NSH: Tensor = self.backbone(embedded_NSH, positions_NS, context, layout)
        return output_NSH[:, -self.options.num_predictions :]

    def logits(self, hidden_H: Tensor) -> Tensor:
        """softcap(lm_head(h)), [..., H] -> [..., V]; -inf for tokens that the draft does not know."""
        return self.spread(self.known_logits(hidden_H))

    def known_logits(self, hidden_H: Tensor) -> Tensor:
        """The same of the tokens that the draft knows, [..., H] -> [..., D]."""
        return softcapped(self.lm_head(hidden_H), self.softcap)

    @property
    def mask_token_id(self) -> int:
        """The token that fills the slots after the anchor."""
        assert self.options.mask_token_id is not None
        return self.options.mask_token_id

    def heads(self) -> Heads:
        """One frozen projection for draft and target; of a reduced vocabulary, some of its rows for the draft."""
        return evolve(self.shared_heads(softcap=self.softcap), target_softcap=self.target_softcap)

    def proposer(self) -> DFlashProposer:
        """The decoding side, sharing these weights."""
        return DFlashProposer(self)

    def tree_proposer(self, nodes: int) -> DFlashTreeProposer:
        """The same with trees."""
        return DFlashTreeProposer(self, nodes)

    def describe(self) -> DraftDescription:
        """Facts for checkpoints, exports and reports."""
        return DraftDescription(
            algorithm=self.algorithm,
            class_name=self.class_name,
            taps=self.taps,
            max_tokens=self.options.num_predictions,
            num_layers=self.options.num_layers,
            anchor_predicts=self.options.anchor_predicts,
            causal=False,
            weight_names={**self.backbone.names("backbone"), "vocabulary.ids": KEY},
            config=self.config(),
            window=self.window,
            gives_confidence=False,
            training_keys=("num_anchors",),
        )

    def config(self) -> dict[str, Any]:
        """What is added to config.json."""
        config = {
            "target_layer_ids": list(self.taps),
            "num_target_layers": self.num_target_layers,
            "block_size": self.options.block_size,
            "mask_token_id": self.mask_token_id,
            "num_anchors": self.options.num_anchors,
            "sample_from_anchor": self.options.anchor_predicts,
            "enable_confidence_head": False,
            "markov_rank": 0,
        }
        return config if self.vocabulary is None else config | {"draft_vocab_size": self.options.vocab_size}


def _mask_token(options: DFlashOptions, adapter: TargetAdapter) -> int:
    """The run's mask token, else the target's own. ConfigError where there is none, or it is no token of the target."""
    chosen = options.mask_token_id if options.mask_token_id is not None else adapter.architecture.mask_token_id
    vocab_size = adapter.architecture.vocab_size
    if chosen is None:
        raise ConfigError(
            "the target has no mask token, and the run names none",
            where="[draft] mask_token_id",
            expected=f"a token id below {vocab_size} that never occurs in text",
            fix="set mask_token_id to an unused or reserved id of the target's vocabulary",
        )
    if chosen >= vocab_size:
        raise ConfigError(
            "the mask token is not in the target's vocabulary",
            where="[draft] mask_token_id",
            found=chosen,
            expected=f"an id below {vocab_size}",
        )
    return chosen
