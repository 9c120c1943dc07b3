"""The decoding side of an algorithm: it proposes tokens for slots and learns which of them were accepted.

A slot is a place in the batch and holds one sequence. The engine (decoding/engine.py) owns the target and its cache. It
verifies proposals, watches for stop tokens and refills slots. A proposer owns only the draft's caches. A proposal is a
chain of tokens or a tree of tokens. In a tree each token names its parent, and verification commits one path from the
root.

The engine checks every proposal (decoding/proposal_check.py). If a proposal breaks this contract, the engine raises an
error that names the proposer, before it commits any of its tokens. When it samples, the engine must trust two things
that it cannot check. The number of proposed tokens, and the confidence in a token, may depend on the tokens before it
and on the draft's distributions. They must not depend on tokens that were drawn but not proposed.

Legend: B slots in this call, T tokens, K the most tokens of a path, M the most proposed tokens (K in a chain),
C = taps * H (with `reads_last_hidden`, (taps + 1) * H), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from deepspec_core.contracts.target import TargetFeatures, TargetStep

__all__ = ["Proposal", "Proposer", "Sampling", "features_for", "reads_last_hidden"]


@frozen(kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 mean that the filter is off.

    repetition_penalty: For every token that already occurs in the prompt or the output, positive logits are divided by
        this number and the others multiplied, before the temperature; 1 is off.
    seen: [B, V] bool, the tokens that already occur in each slot of a call; None without a penalty. The engine sets it
        for what it calls. A proposal's own tokens count too: a proposer adds them with `after`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seen: Tensor | None = field(default=None, eq=False, repr=False)

    def after(self, tokens_BK: Tensor, counted_BK: Tensor | None = None) -> Sampling:
        """The same sampling after these tokens, [B] or [B, K], were added to the slots.

        `counted` [B, K] is true for the tokens that were added; None: all.
        """
        if self.seen is None:
            return self
        tokens_BK = tokens_BK.reshape(len(tokens_BK), -1)
        if counted_BK is not None:
            # A token that does not count is replaced by one that was seen before, such as one of the prompt.
            tokens_BK = tokens_BK.where(counted_BK, self.seen.to(torch.uint8).argmax(1, keepdim=True))
        return evolve(self, seen=self.seen.scatter(1, tokens_BK, True))

    def of(self, rows: Tensor | slice) -> Sampling:
        """The sampling of some of the slots."""
        return self if self.seen is None else evolve(self, seen=self.seen[rows])


@frozen(kw_only=True, eq=False)
class Proposal:
    """The tokens that a draft proposes in one round.

    tokens: [B, M] int64, right-padded with any values. M is at most the proposer's max_tokens, or max_nodes in a tree.
    lengths: [B] int64, the number of tokens proposed in each slot, from 0 to M.
    probabilities: [B, M, V] fp32, fp64 or bf16, the distributions that the tokens were drawn from, each of sum 1 up to
        rounding, 2^-8 at most. Token k was drawn with column k of the uniforms, as by decoding.sampling.draw, from
        these very numbers, in proportion to them. Verification divides them by their sum. Columns beyond a slot's
        length are not read. None if the tokens were not drawn: each distribution then counts as one-hot at its token,
        however it was chosen. Not read at temperature 0.
    confidence: [B, M], finite: the logit of the probability that a token is accepted if all tokens before it are. None
        if the draft gives no confidence.
    parents: [B, M] int64, for a tree: the column of each token's parent, -1 if the parent is the last committed token.
        Parents come before their children, siblings are different tokens, and no path has more than max_tokens tokens.
        None: a chain, in which each token follows the one in the column before. A tree has neither probabilities nor
        confidence: the target draws each token of the path itself, so the choice of the tree cannot change the output's
        distribution.
    """

    tokens: Tensor
    lengths: Tensor
    probabilities: Tensor | None = None
    confidence: Tensor | None = None
    parents: Tensor | None = None


@runtime_checkable
class Proposer(Protocol):
    """Proposes tokens for a batch of slots. The slot of a finished sequence is freed and takes the next prompt.

    The engine reads `max_tokens` and `taps` once, when decoding begins. A proposer of trees also has `max_nodes`, the
    largest number of tokens in a tree; `max_tokens` is then the length of its longest path.

    A proposer may have an attribute `reads_last_hidden`. If it is true, all `features` also hold the output of the
    target's final norm (TargetFeatures.last_hidden) as their last H channels, after the tapped layers. The attribute
    must not change during decoding.
    """

    max_tokens: int
    taps: tuple[int, ...]

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Make room for num_slots sequences of at most max_length tokens. All earlier sequences are forgotten."""
        ...

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """Begin new sequences in slots [B].

        prompt_ids [B, T] are right-padded; lengths [B] are the prompts' lengths. features [B, T, C] are those of
        positions 0..length-1. first_token [B] is the token that the target drew after each prompt, at position
        `length`.
        """
        ...

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """Propose at most limits[b] tokens, one after another, after the last committed token of slots[b].

        uniforms [B, max_tokens], in [0, 1), are the only source of randomness; column k is for the k-th token. So the
        output of a sequence does not depend on the other sequences. The engine may call this again before `accept`; the
        earlier proposal is then void.
        """
        ...

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """Receive the result of verification.

        In slots[b], committed[b] tokens were committed: the accepted proposed tokens, then the target's own token.
        committed_ids [B, K+1] holds them, right-padded. features [B, K+1, C] are the target's features at the verified
        positions: first those of the last token committed before this round, then those of each proposed token (in a
        tree: of the accepted path). The first committed[b] of them belong to committed tokens. Slots whose sequence is
        finished are freed instead.
        """
        ...

    def free(self, slots: Tensor) -> None:
        """Forget the sequences of these slots."""
        ...


def reads_last_hidden(proposer: Proposer) -> bool:
    """Whether the proposer reads the final norm's output in addition to its taps."""
    return bool(getattr(proposer, "reads_last_hidden", False))


def features_for(proposer: Proposer, given: TargetFeatures | TargetStep) -> Tensor:
    """The part of a target's outputs that the proposer reads, [B, T, C]: the taps, then the final norm's output if it
    reads that too."""
    if not reads_last_hidden(proposer):
        return given.hidden
    return torch.cat([given.hidden, given.last_hidden], dim=-1)
