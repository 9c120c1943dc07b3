"""A draft that trains on its own answers: the next token from the last one alone, distilled on what it writes itself.

It reads nothing of the target but the distributions it is compared with. Offered by the plugin whose source is PLUGIN.

Legend: B sequences or slots, T tokens, K predictions of a block, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import evolve
from last_hidden_draft import LastHiddenOptions
from torch import Tensor, nn

from deepspec_core.contracts.draft import DraftBatch, DraftDescription, DraftModel, Texts
from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.decoding.sampling import distribution, draw
from deepspec_core.layers.softcap import softcapped
from deepspec_core.preparation.anchors import AnchorPreparation, anchored_rows

PLUGIN = """
from deepspec_core.plugins import DraftModelSpec, hookimpl
from last_hidden_draft import LastHiddenOptions

@hookimpl
def deepspec_draft_models():
    yield DraftModelSpec(
        name="own-text", summary="trains on its own answers", build="own_text_draft:OwnTextDraft",
        options=LastHiddenOptions, class_suffix="OwnTextDraft", options_of="own_text_draft:options_of",
        recognise=lambda config: str(config.get("architectures")).endswith("OwnTextDraft']"), needs_taps=False,
        default_loss={"terms": {"tv": 1.0}},
    )
"""
SAMPLED = Sampling(temperature=1.0)


def options_of(config: Mapping[str, Any]) -> tuple[LastHiddenOptions, tuple[int, ...]]:
    """Read config.json back."""
    return LastHiddenOptions(block_size=config["block_size"]), ()


class OwnTextDraft(DraftModel):
    """hidden = up(tanh(down(embedding of the last token)))."""

    def __init__(self, options: LastHiddenOptions, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.options, self.softcap = options, adapter.architecture.logit_softcap
        size, vocabulary = adapter.architecture.hidden_size, adapter.architecture.vocab_size
        self.embed_tokens = adapter.embedding().requires_grad_(False)
        self.lm_head = nn.Linear(size, vocabulary, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.class_name = f"{adapter.class_prefix}OwnTextDraft"
        self.preparation = AnchorPreparation(num_predictions=options.block_size, num_anchors=options.num_anchors)

    def hidden(self, ids: Tensor) -> Tensor:
        """[...] -> [..., H]"""
        hidden: Tensor = self.up(torch.tanh(self.down(self.embed_tokens(ids))))
        return hidden

    def next_token(self, ids_B: Tensor, sampling: Sampling, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] and the distributions [B, V] they are drawn from."""
        q_BV = distribution(softcapped(self.lm_head(self.hidden(ids_B)), self.softcap), sampling)
        return draw(q_BV, uniforms_B), q_BV

    def rollout(self, texts: Texts, uniforms: Tensor) -> Texts:
        """Every supervised token is the draft's own, drawn after the one before it."""
        ids_BT = texts.input_ids
        for t in range(1, ids_BT.shape[1]):
            own_B, _ = self.next_token(ids_BT[:, t - 1], SAMPLED, uniforms[:, t])
            ids_BT[:, t] = torch.where(texts.loss_mask[:, t], own_B, ids_BT[:, t])
        return evolve(texts, input_ids=ids_BT)

    def forward(self, batch: DraftBatch) -> Rows:
        """Each prediction from the token before it."""
        sequence_N1, anchors_N1 = batch.prepared["sequence"][:, None], batch.prepared["anchors"][:, None]
        before_NK = anchors_N1 + torch.arange(self.options.block_size, device=anchors_N1.device)
        ids_NK = batch.input_ids[sequence_N1, before_NK.clamp(max=batch.input_ids.shape[1] - 1)]
        return anchored_rows(batch, self.hidden(ids_NK))

    def heads(self) -> Heads:
        """The target's own."""
        return Heads(draft=self.lm_head.weight, target=self.lm_head.weight, softcap=self.softcap)

    def proposer(self) -> OwnTextProposer:
        """Shares the weights."""
        return OwnTextProposer(self)

    def describe(self) -> DraftDescription:
        """No taps."""
        return DraftDescription(
            algorithm="own-text",
            class_name=self.class_name,
            taps=(),
            max_tokens=self.options.block_size,
            num_layers=1,
            anchor_predicts=True,
            causal=True,
            weight_names={},
            config={"block_size": self.options.block_size},
            unread_options=("num_anchors", "from_target"),
        )


class OwnTextProposer:
    """Keeps each slot's last token."""

    taps: tuple[int, ...] = ()

    def __init__(self, draft: OwnTextDraft) -> None:
        self.draft, self.max_tokens = draft, draft.options.block_size

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Empty slots."""
        self.token_S = torch.zeros(num_slots, dtype=torch.long, device=self.draft.lm_head.weight.device)

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """The first token counts."""
        self.token_S[slots] = first_token

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """The last committed token counts."""
        self.token_S[slots] = committed_ids.gather(1, committed[:, None] - 1)[:, 0]

    @torch.no_grad()
    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """Token by token, as rollouts are."""
        token_B, tokens, q = self.token_S[slots], [], []
        for k in range(self.max_tokens):
            token_B, q_BV = self.draft.next_token(token_B, sampling, uniforms[:, k])
            tokens.append(token_B)
            q.append(q_BV)
        lengths_B = limits.clamp(max=self.max_tokens)
        return Proposal(tokens=torch.stack(tokens, 1), lengths=lengths_B, probabilities=torch.stack(q, 1))

    def free(self, slots: Tensor) -> None:
        """Nothing to forget."""
