"""A draft that reads nothing of the target but its last hidden state: no tapped layer, a residual block a token.

Token k of a block is predicted from the target's last hidden state at position p and the token at p + 1, which is the
anchor. It knows no family, and is offered by the plugin whose source is PLUGIN.

Legend: B sequences or slots, T tokens, K predictions of a block, N blocks, H hidden size, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from deepspec_core.contracts.draft import DraftBatch, DraftDescription, DraftModel
from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.decoding.sampling import distribution, draw
from deepspec_core.layers.decoder_layer import initialise
from deepspec_core.layers.softcap import softcapped
from deepspec_core.preparation.anchors import AnchorPreparation, anchored_rows

PLUGIN = """
from deepspec_core.plugins import DraftModelSpec, hookimpl
from last_hidden_draft import LastHiddenOptions

@hookimpl
def deepspec_draft_models():
    yield DraftModelSpec(
        name="last-hidden", summary="reads the last hidden state alone", build="last_hidden_draft:LastHiddenDraft",
        options=LastHiddenOptions, class_suffix="LastHiddenDraft", options_of="last_hidden_draft:options_of",
        recognise=lambda config: str(config.get("architectures")).endswith("LastHiddenDraft']"), needs_taps=False,
        default_loss={"terms": {"ce": 1.0}},
    )
"""


@frozen(kw_only=True)
class LastHiddenOptions:
    """What a run file may say of it.

    from_target: Begin with the target's own prediction layer, its weights named `mtp.`.
    """

    block_size: int = 3
    num_anchors: int = 16
    from_target: bool = False


def options_of(config: Mapping[str, Any]) -> tuple[LastHiddenOptions, tuple[int, ...]]:
    """Read config.json back."""
    return LastHiddenOptions(block_size=config["block_size"], from_target=config["from_target"]), ()


class LastHiddenDraft(DraftModel):
    """hidden_k = norm(last_hidden(p) + up_k(tanh(down([last_hidden(p) ; embedding(token at p + 1)]))))."""

    def __init__(self, options: LastHiddenOptions, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
        super().__init__()
        assert not taps
        self.architecture, self.options = adapter.architecture, options
        size, vocabulary = self.architecture.hidden_size, self.architecture.vocab_size
        self.embed_tokens = adapter.embedding().requires_grad_(False)
        self.lm_head = nn.Linear(size, vocabulary, bias=False).requires_grad_(False)
        self.down = nn.Linear(2 * size, size)
        self.up = nn.Linear(size, options.block_size * size, bias=False)
        self.norm = adapter.norm()
        initialise(self.down, 0.1)
        initialise(self.up, 0.1)
        self.class_name = f"{adapter.class_prefix}LastHiddenDraft"
        predictions, anchors = options.block_size, options.num_anchors
        self.preparation = AnchorPreparation(num_predictions=predictions, num_anchors=anchors, first=1)

    def blocks(self, last_NH: Tensor, anchor_ids_N: Tensor) -> Tensor:
        """[N, K, H]"""
        last_NH = last_NH.to(self.down.weight.dtype)
        state_NH = torch.tanh(self.down(torch.cat([last_NH, self.embed_tokens(anchor_ids_N)], dim=-1)))
        added_NKH = self.up(state_NH).unflatten(-1, (self.options.block_size, -1))
        normed_NKH: Tensor = self.norm(last_NH[:, None] + added_NKH)
        return normed_NKH

    def forward(self, batch: DraftBatch) -> Rows:
        """The counted slots of the blocks at the drawn anchors."""
        sequence_N, anchors_N = batch.prepared["sequence"], batch.prepared["anchors"]
        last_NH = batch.features.last_hidden[sequence_N, (anchors_N - 1).clamp(min=0)]
        return anchored_rows(batch, self.blocks(last_NH, batch.input_ids[sequence_N, anchors_N]))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]"""
        return softcapped(self.lm_head(hidden), self.architecture.logit_softcap)

    def heads(self) -> Heads:
        """The target's own."""
        head = self.lm_head.weight
        return Heads(draft=head, target=head, softcap=self.architecture.logit_softcap)

    def proposer(self) -> LastHiddenProposer:
        """Shares the weights."""
        return LastHiddenProposer(self)

    def describe(self) -> DraftDescription:
        """No taps."""
        return DraftDescription(
            algorithm="last-hidden",
            class_name=self.class_name,
            taps=(),
            max_tokens=self.options.block_size,
            num_layers=1,
            anchor_predicts=True,
            causal=True,
            weight_names={},
            config={"block_size": self.options.block_size, "from_target": self.options.from_target},
            target_weights=("mtp.",) if self.options.from_target else (),
            unread_options=("num_anchors",),
        )

    def adopt_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The target's `mtp.down` and `mtp.up`, as what training begins with."""
        for name in ("down", "up"):
            self.get_submodule(name).load_state_dict(
                {part: weights[f"mtp.{name}.{part}"] for part in self.get_submodule(name).state_dict()}
            )


class LastHiddenProposer:
    """Keeps the last hidden state before each slot's last token. `seen` is what it was given of each slot, in order."""

    taps: tuple[int, ...] = ()
    reads_last_hidden = True

    def __init__(self, draft: LastHiddenDraft) -> None:
        self.draft, self.max_tokens = draft, draft.options.block_size
        self.seen: dict[int, list[Tensor]] = {}

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Empty slots."""
        weight = self.draft.down.weight
        self.last_SH = weight.new_zeros(num_slots, self.draft.architecture.hidden_size)
        self.token_S = torch.zeros(num_slots, dtype=torch.long, device=weight.device)

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """The prompt's last position counts."""
        self.seen |= {slot: [] for slot in slots.tolist()}
        self._keep(slots, features, lengths, first_token)

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """The position before the last committed token counts."""
        self._keep(slots, features, committed, committed_ids.gather(1, committed[:, None] - 1)[:, 0])

    def _keep(self, slots_B: Tensor, features_BTH: Tensor, counts_B: Tensor, tokens_B: Tensor) -> None:
        each_B = torch.arange(len(slots_B), device=counts_B.device)
        self.last_SH[slots_B] = features_BTH[each_B, counts_B - 1].to(self.last_SH)
        self.token_S[slots_B] = tokens_B
        for slot, count, features_TH in zip(slots_B.tolist(), counts_B.tolist(), features_BTH, strict=True):
            self.seen[slot].append(features_TH[:count])

    @torch.no_grad()
    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """Every token of the block at once."""
        logits_BKV = self.draft.logits(self.draft.blocks(self.last_SH[slots], self.token_S[slots]))
        lengths_B = limits.clamp(max=self.max_tokens)
        if sampling.temperature == 0:
            return Proposal(tokens=logits_BKV.argmax(-1), lengths=lengths_B)
        q_BKV = distribution(logits_BKV, sampling)
        return Proposal(tokens=draw(q_BKV, uniforms[:, : self.max_tokens]), lengths=lengths_B, probabilities=q_BKV)

    def free(self, slots: Tensor) -> None:
        """Nothing to forget."""
