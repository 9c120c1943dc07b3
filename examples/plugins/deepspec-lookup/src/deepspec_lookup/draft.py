"""Prompt lookup as a draft: no network, no training, no files.

The idea is prompt lookup decoding (Saxena, 2023): answers often repeat parts of the text before them. So the draft
finds the latest earlier occurrence of the last few tokens, and proposes the tokens that followed it. Knows token ids
only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling
from deepspec_core.contracts.untrained import Surroundings, UntrainedDescription
from deepspec_lookup.options import LookupOptions


class LookupDraft:
    """The draft. It fits every target, because it copies tokens that the target has read or written."""

    def __init__(self, options: LookupOptions, surroundings: Surroundings) -> None:
        self.options = options

    def describe(self) -> UntrainedDescription:
        """Facts."""
        return UntrainedDescription(algorithm="lookup", max_tokens=self.options.max_tokens)

    def digest(self) -> str:
        """Nothing is read."""
        return ""

    def proposer(self) -> Proposer:
        """A new proposer."""
        return LookupProposer(self.options)

    def parameters(self) -> int:
        """There are no weights."""
        return 0


class Text:
    """A sequence, and where each run of `shortest` to `longest` tokens was followed by something last."""

    def __init__(self, options: LookupOptions) -> None:
        self.sizes = range(options.longest, options.shortest - 1, -1)
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            end = len(self.tokens)
            for size in self.sizes:
                if size <= end:
                    self.after[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token)

    def continued(self, count: int) -> list[int]:
        """At most `count` tokens: the latest continuation of the longest known run of last tokens.

        Where the text ends before `count` tokens, it goes on as if it repeated itself.
        """
        for size in self.sizes:
            start = self.after.get(tuple(self.tokens[-size:])) if size <= len(self.tokens) else None
            if start is not None:
                period = len(self.tokens) - start
                return [self.tokens[start + index % period] for index in range(count)]
        return []


class LookupProposer:
    """The decoding side. It chooses tokens and draws none, so each of its distributions is one-hot.

    A proposal without `probabilities` says so, and verification stays exact at every temperature: a token is accepted
    with the target's own probability of it.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, options: LookupOptions) -> None:
        self.options, self.max_tokens = options, options.max_tokens
        self.texts: dict[int, Text] = {}

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Forget all sequences."""
        self.texts = {}

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """Read the prompts."""
        told = zip(slots.tolist(), prompt_ids.tolist(), lengths.tolist(), first_token.tolist(), strict=True)
        for slot, ids, length, token in told:
            self.texts[slot] = Text(self.options)
            self.texts[slot].extend([*ids[:length], token])

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """Look up the last tokens of each slot."""
        counts = limits.clamp(max=self.max_tokens).tolist()
        found = [self.texts[slot].continued(count) for slot, count in zip(slots.tolist(), counts, strict=True)]
        width = max(map(len, found))
        rows = [[*tokens, *[0] * (width - len(tokens))] for tokens in found]
        return Proposal(
            tokens=torch.tensor(rows, dtype=torch.long, device=slots.device).view(len(found), width),
            lengths=torch.tensor([len(tokens) for tokens in found], device=slots.device),
        )

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """Read the committed tokens."""
        for slot, ids, count in zip(slots.tolist(), committed_ids.tolist(), committed.tolist(), strict=True):
            self.texts[slot].extend(ids[:count])

    def free(self, slots: Tensor) -> None:
        """Forget these sequences."""
        for slot in slots.tolist():
            self.texts.pop(slot, None)
