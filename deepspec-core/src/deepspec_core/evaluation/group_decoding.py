"""Decodes one group of prompts plainly and speculatively, at a batch size that fits memory, without failing samples.

A batch that does not fit memory is halved. Both decodings of the group then run at the smaller size, and later groups
begin with it. If decoding raises any other error, each sample is decoded alone. Samples that raise again are left out
and listed. This file knows requests, models and errors. It does not know files, tasks, or how many failures are too
many.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import torch
from attrs import define, evolve, field, frozen

from deepspec_core.contracts.proposer import Proposer, Sampling
from deepspec_core.contracts.target import TargetModel
from deepspec_core.decoding.engine import Clock, Completion, Request, decode
from deepspec_core.decoding.out_of_memory import is_out_of_memory
from deepspec_core.decoding.proposal_check import ProposerFailedError
from deepspec_core.decoding.stop_text import StopText
from deepspec_core.errors import DeepSpecError
from deepspec_core.evaluation.parting import Parting, differs, parting
from deepspec_core.evaluation.peak_memory import forget_peak, peak_bytes
from deepspec_core.evaluation.turns import LaterTurns
from deepspec_core.plugins.references import blame

log = logging.getLogger("deepspec")

WARM_UP_TOKENS = 16


@frozen(kw_only=True)
class Decoding:
    """What both decodings of an evaluation share. `max_length` is the greatest length of a sequence with its prompt.

    `later` asks the further turns of a conversation, after the answers of the same decoding. Without it, only the given
    requests are decoded.
    """

    target: TargetModel
    proposer: Proposer
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    max_length: int
    batch_size: int
    plain: bool = True
    confidence_threshold: float = 0.0
    stop_text: StopText | None = None
    later: LaterTurns | None = None


@frozen(kw_only=True)
class Timing:
    """The seconds of one decoding, by part, and the number of tokens in its output.

    peak_bytes: The peak memory (peak_memory.py). None where it is not known, as in journals of older versions.
    """

    tokens: int
    wall: float
    prefill: float
    draft: float
    verify: float
    host: float
    peak_bytes: int | None = None


@frozen(kw_only=True)
class Failure:
    """A sample that failed and counts in no figure, and the reason."""

    id: str
    reason: str


@frozen(kw_only=True)
class Group:
    """The results of one group of prompts. `plain` is None if plain decoding is off.

    workers: How many workers decoded groups at the same time.
    failures: The samples that raised an error. They have no completion.
    halved_to: How many sequences were decoded at once, if the requested batch size did not fit memory; else None.
    """

    completions: tuple[Completion, ...]
    speculative: Timing
    plain: Timing | None
    mismatches: tuple[Parting, ...] = field(factory=tuple)
    workers: int = 1
    failures: tuple[Failure, ...] = field(factory=tuple)
    halved_to: int | None = None


@frozen(kw_only=True)
class _Fault:
    """The error that ended an attempt to decode a group."""

    error: Exception
    memory: bool


@define
class GroupDecoder:
    """Decodes groups one after another, at first with the given batch size. Warnings call the groups' task `what`."""

    decoding: Decoding
    what: str
    size: int

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Decode a few tokens both ways without measuring, because first calls also allocate memory and select kernels.

        The key-value caches are allocated for the whole max_length, so a few tokens are enough. Errors are ignored
        here: a sample that raises is found when its group is decoded.
        """
        tokens = min(self.decoding.max_new_tokens, WARM_UP_TOKENS)
        brief = evolve(self.decoding, max_new_tokens=tokens, later=None)
        while isinstance(found := self._attempt(requests[: self.size], brief), _Fault) and found.memory:
            if not self._halve():
                return

    def __call__(self, requests: Sequence[Request]) -> Group:
        """Decode the group. If decoding raises an error, but no sample raises one alone, that error is raised again."""
        failures: list[Failure] = []
        left = list(requests)
        while isinstance(found := self._attempt(left, self.decoding), _Fault):
            if found.memory and self._halve():
                continue
            failed = self._failing_alone(left)
            if not failed:
                raise found.error
            failures += failed
            left = [request for request in left if request.id not in {one.id for one in failed}]
        return evolve(found, failures=tuple(failures))

    def _attempt(self, requests: Sequence[Request], decoding: Decoding, size: int | None = None) -> Group | _Fault:
        size = self.size if size is None else size
        try:
            group = _both(requests, evolve(decoding, batch_size=size))
        except Exception as error:
            if isinstance(error, DeepSpecError) and not isinstance(error, ProposerFailedError):
                raise
            memory = is_out_of_memory(error)
            if memory:
                # The traceback's frames hold the tensors that took the memory.
                error.__traceback__ = error.__context__ = error.__cause__ = None
            log.debug("%s: an attempt at %d sequences at once failed", self.what, size, exc_info=error)
            fault = _Fault(error=error, memory=memory)
        else:
            return evolve(group, halved_to=size if size < self.decoding.batch_size else None)
        if fault.memory:
            self._let_go()
        return fault

    def _failing_alone(self, requests: Sequence[Request]) -> list[Failure]:
        tried = ((request.id, self._attempt([request], self.decoding, 1)) for request in requests)
        return [
            Failure(id=identity, reason=_reason(outcome.error))
            for identity, outcome in tried
            if isinstance(outcome, _Fault)
        ]

    def _halve(self) -> bool:
        """Halve the batch size. Returns whether there is a smaller size to try."""
        if self.size == 1:
            return False
        log.warning(
            "%s: %d sequences at once do not fit memory: going on with %d, with the draft and without",
            self.what,
            self.size,
            self.size // 2,
        )
        self.size //= 2
        return True

    def _let_go(self) -> None:
        """Free the caches of the last attempt before the next attempt allocates its own."""
        self.decoding.target.open_slots(1, 1)
        self.decoding.proposer.open_slots(1, 1)
        gc.collect()
        if self.decoding.target.device.type == "cuda":
            torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    return f"{error.problem}: {error.found}" if isinstance(error, ProposerFailedError) else blame(error)


def _both(requests: Sequence[Request], decoding: Decoding) -> Group:
    plain_outputs, plain = _run(requests, decoding, None) if decoding.plain else ({}, None)
    completions, speculative = _run(requests, decoding, decoding.proposer)
    greedy = decoding.sampling.temperature == 0
    parted = [done for key, done in completions.items() if greedy and differs(done, plain_outputs.get(key))]
    return Group(
        completions=tuple(completions.values()),
        speculative=speculative,
        plain=plain,
        mismatches=tuple(parting(decoding.target, done, plain_outputs[done.id], decoding.sampling) for done in parted),
    )


def _run(
    requests: Sequence[Request], decoding: Decoding, proposer: Proposer | None
) -> tuple[dict[str, Completion], Timing]:
    clock, later, device = Clock(), decoding.later, decoding.target.device
    forget_peak(device)
    answers: dict[str, list[Completion]] = {request.id: [] for request in requests}
    pending, max_length = {request.id: request for request in requests}, decoding.max_length
    while pending:
        owner = {request.id: identity for identity, request in pending.items()}
        for completion in decode(
            decoding.target,
            proposer,
            list(pending.values()),
            sampling=decoding.sampling,
            stop_ids=decoding.stop_ids,
            max_new_tokens=decoding.max_new_tokens,
            batch_size=decoding.batch_size,
            max_length=max_length,
            confidence_threshold=decoding.confidence_threshold,
            stop_text=decoding.stop_text,
            clock=clock,
        ):
            answers[owner[completion.id]].append(completion)
        if later is None:
            break
        following = ((identity, later.next(identity, answers[identity])) for identity in pending)
        pending = {identity: request for identity, request in following if request is not None}
        longest = max((len(request.prompt_ids) for request in pending.values()), default=0)
        max_length = min(later.positions, longest + decoding.max_new_tokens)
    ordered = {completion.id: completion for request in requests for completion in answers[request.id]}
    return ordered, Timing(
        tokens=sum(len(completion.output_ids) for completion in ordered.values()),
        wall=clock.wall,
        prefill=clock.prefill,
        draft=clock.draft,
        verify=clock.verify,
        host=clock.host,
        peak_bytes=peak_bytes(device),
    )
