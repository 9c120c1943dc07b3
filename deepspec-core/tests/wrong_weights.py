"""Drafts that are wrong in what they do with weights that they are given, in one way each, as its docstring says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from last_hidden_draft import LastHiddenDraft, LastHiddenProposer
from torch import Tensor
from wrong_drafts import Caught

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.sampling import draw
from deepspec_core.layers.softcap import softcapped
from deepspec_core.testing.driven_proposer import GREEDY


class ComputesInFloat32(LastHiddenDraft):
    """proposes with weights in float32 alone"""

    def proposer(self) -> LastHiddenProposer:
        return _InFloat32(self)


class _InFloat32(LastHiddenProposer):
    def open_slots(self, num_slots: int, max_length: int) -> None:
        super().open_slots(num_slots, max_length)
        self.last_SH = torch.zeros(num_slots, 32)

    def _keep(self, slots_B: Tensor, features_BTH: Tensor, counts_B: Tensor, tokens_B: Tensor) -> None:
        self.last_SH[slots_B] = features_BTH[torch.arange(len(slots_B)), counts_B - 1]
        self.token_S[slots_B] = tokens_B


class ProbabilitiesInFloat16(LastHiddenDraft):
    """gives the probabilities of a bfloat16 draft in float16"""

    def proposer(self) -> LastHiddenProposer:
        return _Rounded(self)


class _Rounded(LastHiddenProposer):
    @torch.no_grad()
    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        greedy = super().propose(slots, limits, GREEDY, uniforms, stop_ids)
        if sampling.temperature == 0:
            return greedy
        hidden_BKH = self.draft.blocks(self.last_SH[slots], self.token_S[slots])
        q_BKV = softcapped(self.draft.lm_head(hidden_BKH), self.draft.architecture.logit_softcap).softmax(-1)
        q_BKV = q_BKV.half() if q_BKV.dtype == torch.bfloat16 else q_BKV
        tokens_BK = draw(q_BKV, uniforms[:, : self.max_tokens])
        return Proposal(tokens=tokens_BK, lengths=greedy.lengths, probabilities=q_BKV)


class AdoptsNothing(LastHiddenDraft):
    """ignores the target's weights that it asked for"""

    def adopt_weights(self, weights: Mapping[str, Tensor]) -> None:
        pass


class KeepsTheTargetsMemory(LastHiddenDraft):
    """takes the target's weights with their number format and memory"""

    def adopt_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.up.load_state_dict({"weight": weights["mtp.up.weight"]}, assign=True)


class WritesOverTheEmbedding(LastHiddenDraft):
    """writes over the embedding with other weights of the target"""

    def adopt_weights(self, weights: Mapping[str, Tensor]) -> None:
        super().adopt_weights(weights)
        with torch.no_grad():
            torch.as_tensor(self.embed_tokens.weight)[:32].copy_(weights["mtp.down.weight"][:, :32])


CAUGHT = (
    Caught(ComputesInFloat32, "decoding_in_bfloat16", "dtype"),
    Caught(ProbabilitiesInFloat16, "decoding_in_bfloat16", "probabilities"),
    Caught(AdoptsNothing, "weights_of_the_target", "no weight"),
    Caught(KeepsTheTargetsMemory, "weights_of_the_target", "bfloat16"),
    Caught(WritesOverTheEmbedding, "weights_of_the_target", "embed_tokens"),
)
