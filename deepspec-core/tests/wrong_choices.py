"""Drafts that choose the wrong tokens where none is drawn, in one way each, as its docstring says.

Legend: B slots, K proposed tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve
from last_hidden_draft import LastHiddenProposer
from torch import Tensor
from wrong_drafts import Caught, _Decoding

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.testing.driven_proposer import GREEDY


class ProposesTheLeastProbable(_Decoding):
    """proposes the least probable tokens at temperature 0"""

    class wrong(LastHiddenProposer):
        def propose(self, slots: Tensor, limits: Tensor, sampling: Sampling, *given: Any) -> Proposal:
            found = super().propose(slots, limits, sampling, *given)
            if sampling.temperature > 0:
                return found
            logits_BKV = self.draft.logits(self.draft.blocks(self.last_SH[slots], self.token_S[slots]))
            return evolve(found, tokens=logits_BKV.argmin(-1))


class RollsTokens(_Decoding):
    """proposes each token one place late at temperature 0"""

    class wrong(LastHiddenProposer):
        def propose(self, slots: Tensor, limits: Tensor, sampling: Sampling, *given: Any) -> Proposal:
            found = super().propose(slots, limits, sampling, *given)
            return found if sampling.temperature > 0 else evolve(found, tokens=found.tokens.roll(1, 1))


class NextIdsWithoutProbabilities(_Decoding):
    """proposes the id after the most probable one, without probabilities"""

    class wrong(LastHiddenProposer):
        def propose(self, slots: Tensor, limits: Tensor, sampling: Sampling, *given: Any) -> Proposal:
            found = super().propose(slots, limits, GREEDY, *given)
            return found if sampling.temperature == 0 else evolve(found, tokens=(found.tokens + 1) % 64)


class ArraysForTokens(_Decoding):
    """proposes tokens in an array"""

    class wrong(LastHiddenProposer):
        def propose(self, *given: Any) -> Proposal:
            found = super().propose(*given)
            return evolve(found, tokens=found.tokens.numpy())


CAUGHT = (
    Caught(ProposesTheLeastProbable, "greedy_tokens_are_those_of_training", "most probable"),
    Caught(RollsTokens, "greedy_tokens_are_those_of_training", "most probable"),
    Caught(ArraysForTokens, "slots_do_not_see_each_other", "ndarray, not a tensor"),
    Caught(NextIdsWithoutProbabilities, "decoding_sees_what_training_sees", "most probable"),
)
