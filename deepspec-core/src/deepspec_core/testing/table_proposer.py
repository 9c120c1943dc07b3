"""A proposer for tests: its distributions come from a fixed random table, so it needs no features and no training.

Legend: B slots in a call, K proposed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.sampling import next_token

__all__ = ["TableProposer"]


class TableProposer:
    """A proposer whose distribution of a token depends only on the token before. It records what the engine tells it.

    `stop_short`: propose only (slot + round) % (K + 1) tokens, to exercise ragged and empty proposals.
    """

    def __init__(
        self, *, vocab_size: int, max_tokens: int, taps: tuple[int, ...] = (0,), seed: int = 0, stop_short: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits_VV = 2 * torch.randn(vocab_size, vocab_size, generator=generator)
        self.max_tokens, self.taps, self.stop_short = max_tokens, taps, stop_short
        self.last: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.round = 0

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Forget all sequences."""
        self.last, self.seen = {}, {}

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """Remember each slot's last token and how many features it was given."""
        for slot, length, token in zip(slots.tolist(), lengths.tolist(), first_token.tolist(), strict=True):
            self.last[slot], self.seen[slot] = token, length

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """Propose a chain of tokens from the table."""
        token_B = torch.tensor([self.last[slot] for slot in slots.tolist()])
        tokens, probabilities = [], []
        for k in range(self.max_tokens):
            token_B, p_BV = next_token(self.logits_VV[token_B], sampling, uniforms[:, k])
            sampling = sampling.after(token_B)
            tokens.append(token_B)
            probabilities.append(F.one_hot(token_B, self.logits_VV.shape[1]).float() if p_BV is None else p_BV)
        lengths_B = torch.minimum(limits, torch.full_like(limits, self.max_tokens))
        if self.stop_short:
            self.round += 1
            lengths_B = torch.minimum(lengths_B, (slots + self.round) % (self.max_tokens + 1))
        return Proposal(tokens=torch.stack(tokens, 1), lengths=lengths_B, probabilities=torch.stack(probabilities, 1))

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """Remember each slot's new last token."""
        for row, slot in enumerate(slots.tolist()):
            count = int(committed[row])
            self.last[slot] = int(committed_ids[row, count - 1])
            self.seen[slot] += count

    def free(self, slots: Tensor) -> None:
        """Forget these slots."""
        for slot in slots.tolist():
            self.last.pop(slot, None)
