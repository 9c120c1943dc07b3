"""The decoding side of an algorithm: it proposes tokens for slots and is told which of them were accepted.

A slot is a place in the batch and holds one sequence. The engine (decoding/engine.py) owns the target and its cache,
verifies, watches for stop tokens and refills slots. A proposer owns only the draft's caches. A proposal is a chain of
tokens, or a tree of them: then each token names its parent, and verification commits one path from the root.

The engine checks every proposal (decoding/proposal_check.py) and ends with an error that names the proposer before it
commits a token of one that breaks this contract. Two things it cannot see, and trusts when it samples: how many tokens
are proposed, and the confidence in a token, follow from the tokens before it and the draft's distributions, never from
the tokens that are left out.

Legend: B slots in this call, T tokens, K tokens of a path at most, M proposed tokens at most (K in a chain),
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

    repetition_penalty: Divides the positive logits, and multiplies the others, of every token that the prompt or the
        output has already, before the temperature; 1 is off.
    seen: [B, V] bool, those tokens in each slot of a call, where there is a penalty. Only the engine, and what it
        calls, has them: a proposal's own tokens count too, once `after` is told of them.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seen: Tensor | None = field(default=None, eq=False, repr=False)

    def after(self, tokens_BK: Tensor, counted_BK: Tensor | None = None) -> Sampling:
        """The sampling when these tokens, [B] or [B, K], stand in the slots too.

        `counted` [B, K] says which of them do; None: all.
        """
        if self.seen is None:
            return self
        tokens_BK = tokens_BK.reshape(len(tokens_BK), -1)
        if counted_BK is not None:
            # In place of a token that does not count stands one that was seen before, such as a prompt's.
            tokens_BK = tokens_BK.where(counted_BK, self.seen.to(torch.uint8).argmax(1, keepdim=True))
        return evolve(self, seen=self.seen.scatter(1, tokens_BK, True))

    def of(self, rows: Tensor | slice) -> Sampling:
        """The sampling of some of the slots."""
        return self if self.seen is None else evolve(self, seen=self.seen[rows])


@frozen(kw_only=True, eq=False)
class Proposal:
    """The tokens that a draft proposes in one round.

    tokens: [B, M] int64, right-padded with anything. M is at most the proposer's max_tokens, or max_nodes in a tree.
    lengths: [B] int64, the number of tokens proposed in each slot, from 0 to M.
    probabilities: [B, M, V] fp32 or fp64, the distributions the tokens were drawn from, each of sum 1: token k with
        column k of the uniforms, as decoding.sampling.draw does it. None if each is one-hot at its token, however that
        was chosen. Not read at temperature 0.
    confidence: [B, M], the logit that a token is accepted given that all before it are, finite; None without such a
        head.
    parents: [B, M] int64, of a tree: the column of the token before each token, -1 where that is the last committed
        one. Parents stand before their children, siblings differ, and no path has more than max_tokens tokens. None: a
        chain, where each token follows the one in the column before. A tree has neither probabilities nor confidence:
        the target draws each token of its path itself, so how the tree was chosen cannot change what is drawn.
    """

    tokens: Tensor
    lengths: Tensor
    probabilities: Tensor | None = None
    confidence: Tensor | None = None
    parents: Tensor | None = None


@runtime_checkable
class Proposer(Protocol):
    """Proposes tokens for a batch of slots. The slot of a finished sequence is freed and takes the next prompt.

    `max_tokens` and `taps` are read once, when decoding begins. A proposer of trees has one number more, `max_nodes`:
    how many tokens a tree has at most. `max_tokens` is then the length of its longest path.

    A proposer may also have an attribute `reads_last_hidden`. If it is true, the output of the target's final norm
    (TargetFeatures.last_hidden) stands behind the tapped layers in all `features`, as their last H channels. It does
    not change while decoding.
    """

    max_tokens: int
    taps: tuple[int, ...]

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Make room for num_slots sequences of at most max_length tokens. All earlier sequences are forgotten."""
        ...

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """Begin new sequences in slots [B].

        Prompts [B, T] are right-padded and have lengths [B]. Their features [B, T, C] are of positions 0..length-1.
        first_token [B] is the token that the target drew after each prompt, at position `length`.
        """
        ...

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """Propose at most limits[b] tokens, one after another, after the last committed token of slots[b].

        uniforms [B, max_tokens], in [0, 1), are the only source of randomness; column k is for the k-th token. So the
        output of a sequence does not depend on the other sequences. A call may come again before `accept`: what was
        proposed before does not count.
        """
        ...

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """Take up the result of verification.

        In slots[b], committed[b] tokens were committed: the accepted proposed tokens, then the target's own token.
        committed_ids [B, K+1] holds them, right-padded. features [B, K+1, C] are the target's at the verified
        positions: first that of the token that was committed last before this round, then that of each proposed token,
        of a tree those of the accepted path. The first committed[b] of them are of committed tokens. Slots whose
        sequence is finished are freed instead.
        """
        ...

    def free(self, slots: Tensor) -> None:
        """Forget the sequences of these slots."""
        ...


def reads_last_hidden(proposer: Proposer) -> bool:
    """Whether the proposer asks for the final norm's output beside its taps."""
    return bool(getattr(proposer, "reads_last_hidden", False))


def features_for(proposer: Proposer, given: TargetFeatures | TargetStep) -> Tensor:
    """What the proposer is given of a target's outputs: [B, T, C], the taps, then what it asks for beside them."""
    if not reads_last_hidden(proposer):
        return given.hidden
    return torch.cat([given.hidden, given.last_hidden], dim=-1)
