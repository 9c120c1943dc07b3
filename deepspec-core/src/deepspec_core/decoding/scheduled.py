"""A proposer whose proposals are cut to the tokens that are worth verifying at the present load.

The engine verifies the active sequences together. The wrapped proposer's confidences and a cost table determine how
many tokens of each sequence to verify. The target's distribution does not change. With sampling, a sequence's actual
tokens depend on its neighbours, because they change the lengths of its rounds; greedy tokens do not. Knows proposals
and costs. Does not know where costs come from.

Legend: B slots in a call, K draft tokens at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling, reads_last_hidden
from deepspec_core.decoding.confidence import shortened
from deepspec_core.decoding.proposal_check import refuse_confidence
from deepspec_core.decoding.scheduler import AsynchronousScheduler, Speed, Survival, admit
from deepspec_core.errors import ConfigError


class ScheduledProposer:
    """Cuts proposals by Algorithm 1, or by its asynchronous form.

    `speed(requests, tokens)` are the target's steps a second, for every number of requests up to the batch size and of
    tokens up to requests * (max_tokens + 1); CostTable.steps_per_second is one. The wrapped proposer's confidences are
    taken as they are: wrap a CalibratedProposer if they need scaling.
    """

    def __init__(self, proposer: Proposer, speed: Callable[[int, int], float], *, asynchronous: bool = False) -> None:
        self.proposer, self.speed, self.asynchronous = proposer, speed, asynchronous
        self.max_tokens, self.taps = proposer.max_tokens, proposer.taps
        self.max_nodes = getattr(proposer, "max_nodes", proposer.max_tokens)
        self.reads_last_hidden = reads_last_hidden(proposer)
        self._admit: Callable[[Survival, Speed], Sequence[int]] = admit

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """As the wrapped proposer does. The asynchronous form starts anew."""
        self.proposer.open_slots(num_slots, max_length)
        self._admit = AsynchronousScheduler().admit if self.asynchronous else admit

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """As the wrapped proposer does."""
        self.proposer.start(slots, prompt_ids, lengths, first_token, features)

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """The admitted tokens of the wrapped proposer's proposal. Raises ConfigError if it has no confidence."""
        proposal = self.proposer.propose(slots, limits, sampling, uniforms, stop_ids)
        if proposal.confidence is None:
            raise ConfigError(
                "this draft gives no confidence to schedule by", expected="a draft with a confidence head"
            )
        refuse_confidence(self.proposer, proposal)
        survival_BK = proposal.confidence.double().sigmoid().cumprod(1)
        lengths = proposal.lengths.tolist()
        survivals = [row[:length] for row, length in zip(survival_BK.tolist(), lengths, strict=True)]
        admitted = self._admit(survivals, partial(self.speed, len(lengths)))
        return shortened(proposal, proposal.lengths.new_tensor(admitted))

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """As the wrapped proposer does."""
        self.proposer.accept(slots, committed_ids, committed, features)

    def free(self, slots: Tensor) -> None:
        """As the wrapped proposer does."""
        self.proposer.free(slots)
