"""The decoding side of an algorithm: proposes tokens for slots, learns what was accepted.

The engine (decoding/engine.py) owns the target, its cache, verification, stop tokens and refill; a proposer owns the
draft's caches only. Chains only; a tree would add a `parents` field to Proposal.

Legend: B slots in this call, T tokens, K proposed tokens at most, C = taps * H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from attrs import frozen
from torch import Tensor

__all__ = ["Proposal", "Proposer", "Sampling"]


@frozen(kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@frozen(kw_only=True, eq=False)
class Proposal:
    """tokens [B, K] int64, right-padded; lengths [B] int64, how many of them are proposed (0 is allowed).

    probabilities [B, K, V]: the distributions the tokens were drawn from, None = one-hot at the tokens.
    confidence [B, K]: logits of surviving verification given that all before survived, None without such a head.
    """

    tokens: Tensor
    lengths: Tensor
    probabilities: Tensor | None = None
    confidence: Tensor | None = None


@runtime_checkable
class Proposer(Protocol):
    """Batched over slots; a finished sequence's slot is freed and takes the next prompt."""

    max_tokens: int
    taps: tuple[int, ...]

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Make room for num_slots sequences of at most max_length tokens; forgets what was held before."""
        ...

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """New sequences in slots [B]: prompts [B, T] right-padded with lengths [B], their features [B, T, C] (positions
        0..length-1), and the first token [B] the target drew after them (at position `length`)."""
        ...

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """At most limits[b] tokens after each slot's last committed one. uniforms [B, max_tokens] in [0, 1) are the
        only randomness, column k for the k-th token, so that a sample's output does not depend on its neighbours."""
        ...

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """After verification: slots[b] committed committed[b] tokens (accepted drafts, then the target's own token),
        given in committed_ids [B, K+1] right-padded. features [B, K+1, C] are the target's at the verified positions:
        the previous last committed token first, then each draft token; the first committed[b] of them are of tokens
        that stand. Slots that finished are freed instead."""
        ...

    def free(self, slots: Tensor) -> None:
        """These slots hold nothing any more."""
        ...
