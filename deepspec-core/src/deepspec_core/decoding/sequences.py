"""A sequence before, while and after it is decoded: the request, its state in a slot, and its completion.

Knows when an output is over. Does not know how tokens come about.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from attrs import define, field, frozen

from deepspec_core.decoding.stop_text import Watch


@frozen(kw_only=True)
class Request:
    """A prompt to continue. All randomness of the sequence follows from `seed`."""

    id: str
    prompt_ids: tuple[int, ...]
    seed: int


@frozen
class Round:
    """One proposal and its verification, before trimming.

    `confidence` holds the tokens' logits of acceptance, if any. Of a tree, `proposal_length` is that of its longest
    path and `nodes` the number of its tokens; None: a chain.
    """

    proposal_length: int
    accepted_draft_length: int
    acceptance_length: int
    confidence: tuple[float, ...] | None = None
    nodes: int | None = None


@frozen(kw_only=True)
class Completion:
    """A finished sequence. output_ids have no prompt, are trimmed to the limit, and include the stop token."""

    id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    finish_reason: str
    rounds: tuple[Round, ...]


@frozen
class Committed:
    """The ids that a round added to a sequence's output. The draft proposed the first `accepted` of them."""

    id: str
    ids: tuple[int, ...]
    accepted: int


@define
class Underway:
    """A sequence in a slot. `position` is that of its last committed token, which the target has not read yet.

    `limit`: the largest number of output tokens. `enough`: the number of committed tokens after which no round follows.
    """

    request: Request
    limit: int
    enough: int
    random: np.random.Generator
    watch: Watch | None
    output: list[int] = field(factory=list)
    rounds: list[Round] = field(factory=list)
    stopped: bool = False

    @property
    def position(self) -> int:
        return len(self.request.prompt_ids) + len(self.output) - 1

    def append(self, tokens: Sequence[int], stop_ids: Sequence[int]) -> None:
        """Add tokens, up to the one that completes a stop string."""
        for token in tokens:
            self.output.append(token)
            self.stopped = token in stop_ids
            # Stop tokens have no text, and tokens beyond the limit are not shown.
            if not self.stopped and self.watch is not None and len(self.output) <= self.limit:
                self.stopped = self.watch.push(token)
            if self.stopped:
                break

    @property
    def done(self) -> bool:
        return self.stopped or len(self.output) >= self.enough

    def completion(self) -> Completion:
        """The finished sequence."""
        return Completion(
            id=self.request.id,
            prompt_ids=self.request.prompt_ids,
            output_ids=tuple(self.output[: self.limit]),
            finish_reason="stop" if self.stopped and len(self.output) <= self.limit else "length",
            rounds=tuple(self.rounds),
        )
