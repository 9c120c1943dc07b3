"""Decoding in rounds. A proposer proposes tokens, the target verifies them, and the next prompt takes a free slot.

The engine owns the target's cache, verifies, watches for stop tokens and refills slots. It knows no algorithm. Without
a proposer it decodes plainly, one token a round, with the same code, so that the times of both can be compared. A
sequence's random numbers depend only on its own seed, never on the other sequences.

Legend: B sequences in a round, T tokens, K draft tokens of a path at most, M proposed tokens at most (K in a chain),
C = taps * H, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from attrs import define, field, frozen
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling, features_for
from deepspec_core.contracts.target import TargetModel, TargetStep
from deepspec_core.decoding.confidence import cut
from deepspec_core.decoding.proposal_check import Checked, ProposalCheck
from deepspec_core.decoding.sampling import distribution, draw
from deepspec_core.decoding.tree import score_tree
from deepspec_core.decoding.verify import Verdict, verify


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
class Clock:
    """Seconds spent in each part of decoding. `host` is the rest of the engine's wall time."""

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    wall: float = 0.0

    @property
    def host(self) -> float:
        """Seconds spent in none of the parts."""
        return self.wall - self.prefill - self.draft - self.verify

    @contextmanager
    def measure(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the time of the block to `part`. Waits for the device before and after the block."""
        _synchronize(device)
        start = time.perf_counter()
        yield
        _synchronize(device)
        setattr(self, part, getattr(self, part) + time.perf_counter() - start)


@define
class _Sequence:
    """A sequence in a slot. `position` is that of its last committed token, which the target has not read yet."""

    request: Request
    limit: int
    output: list[int]
    random: np.random.Generator
    rounds: list[Round] = field(factory=list)

    @property
    def position(self) -> int:
        return len(self.request.prompt_ids) + len(self.output) - 1


@torch.no_grad()  # of a generator: while it runs, not while its caller does
def decode(
    target: TargetModel,
    proposer: Proposer | None,
    requests: Iterable[Request],
    *,
    sampling: Sampling,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    max_length: int,
    confidence_threshold: float = 0.0,
    clock: Clock | None = None,
    on_round: Callable[[Committed], None] | None = None,
) -> Iterator[Completion]:
    """Continue every request. Completions are yielded as they finish.

    At most `batch_size` sequences are decoded at once, each of at most `max_length` tokens with its prompt. A prompt
    that leaves room for fewer than max_new_tokens gets as many as fit; a prompt that leaves no room is a ValueError.
    Another round starts while fewer than limit + 1 tokens are committed, as in the published loop; then the output is
    trimmed. With a `confidence_threshold` above 0, each proposal ends before its first token of lower confidence.
    `on_round` gets every token of the output once, in the order of the sequence.

    PluginError if the proposer returns what cannot be verified (proposal_check.py). What it returns can cost speed, and
    never changes an output: tokens of such a round are not committed.
    """
    engine = _Engine(
        target,
        proposer,
        None if proposer is None else ProposalCheck(proposer, vocab_size=target.architecture.vocab_size),
        sampling,
        tuple(stop_ids),
        max_new_tokens,
        batch_size,
        max_length,
        confidence_threshold,
        clock or Clock(),
        on_round,
    )
    yield from engine.run(iter(requests))


@define
class _Engine:
    target: TargetModel
    proposer: Proposer | None
    check: ProposalCheck | None
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    batch_size: int
    max_length: int
    confidence_threshold: float
    clock: Clock
    on_round: Callable[[Committed], None] | None
    active: dict[int, _Sequence] = field(factory=dict)

    @property
    def num_draft(self) -> int:
        return self.check.max_tokens if self.check else 0

    @property
    def taps(self) -> tuple[int, ...]:
        return self.check.taps if self.check else ()

    def run(self, requests: Iterator[Request]) -> Iterator[Completion]:
        # The last round may start with max_length committed tokens, and verifies the widest proposal there can be.
        capacity = self.max_length + (max(self.check.max_nodes, self.num_draft) if self.check else 0) + 1
        self.target.open_slots(self.batch_size, capacity)
        if self.proposer and self.check:
            with self.check.calling("open_slots"):
                self.proposer.open_slots(self.batch_size, capacity)
        exhausted = False
        while True:
            start = time.perf_counter()
            done: list[Completion] = []
            free = [slot for slot in range(self.batch_size) if slot not in self.active]
            fresh: dict[int, Request] = {}
            while free and not exhausted:
                request = next(requests, None)
                if request is None:
                    exhausted = True
                else:
                    fresh[free.pop(0)] = request
            if fresh:
                done += self._admit(fresh)
            if self.active:
                done += self._round()
            self.clock.wall += time.perf_counter() - start
            yield from done
            if exhausted and not self.active:
                return

    def _admit(self, fresh: dict[int, Request]) -> list[Completion]:
        """Prefill new prompts together, and draw the first token of each."""
        device = self.target.device
        lengths = [len(request.prompt_ids) for request in fresh.values()]
        for request in fresh.values():
            if not 0 < len(request.prompt_ids) < self.max_length:
                raise ValueError(
                    f"request {request.id}: {len(request.prompt_ids)} prompt tokens do not fit {self.max_length} in all"
                )
        slots_B = torch.tensor(list(fresh), device=device)
        lengths_B = torch.tensor(lengths, device=device)
        ids_BT = torch.zeros(len(fresh), max(lengths), dtype=torch.long)
        for row, request in enumerate(fresh.values()):
            ids_BT[row, : lengths[row]] = torch.tensor(request.prompt_ids)
        ids_BT = ids_BT.to(device)
        positions_BT = torch.arange(max(lengths), device=device).expand_as(ids_BT)
        positions_BT = positions_BT.where(positions_BT < lengths_B[:, None], -1)
        with self.clock.measure("prefill", device):
            step = self.target.decode(slots_B, ids_BT, positions_BT, self.taps, last_only=True)
            self.target.commit(slots_B, lengths_B)
        generators = [np.random.Generator(np.random.Philox(key=request.seed)) for request in fresh.values()]
        first_B = self._first_tokens(step.logits[:, 0], generators)
        done, alive = [], []
        for row, (slot, request) in enumerate(fresh.items()):
            sequence = _Sequence(
                request=request,
                limit=min(self.max_new_tokens, self.max_length - lengths[row]),
                output=[int(first_B[row])],
                random=generators[row],
            )
            self._tell(sequence, 0, 0)
            if sequence.output[0] in self.stop_ids:
                done.append(self._finish(slot, sequence))
            else:
                self.active[slot] = sequence
                alive.append(row)
        if self.proposer and self.check and alive:
            with self.clock.measure("draft", device), self.check.calling("start"):
                rows = torch.tensor(alive, device=device)
                seen_BTC = features_for(self.proposer, step)
                self.proposer.start(slots_B[rows], ids_BT[rows], lengths_B[rows], first_B[rows], seen_BTC[rows])
        return done

    def _first_tokens(self, logits_BV: Tensor, generators: list[np.random.Generator]) -> Tensor:
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1)
        uniforms_B = torch.tensor([generator.random() for generator in generators], device=logits_BV.device)
        return draw(distribution(logits_BV, self.sampling), uniforms_B)

    def _round(self) -> list[Completion]:
        """One proposal and one verification for every active slot, in ascending order of slots."""
        device = self.target.device
        self.active = dict(sorted(self.active.items()))
        sequences = list(self.active.values())
        slots_B = torch.tensor(list(self.active), device=device)
        last_B = torch.tensor([sequence.output[-1] for sequence in sequences], device=device)
        position_B = torch.tensor([sequence.position for sequence in sequences], device=device)
        uniforms_BU = self._uniforms(sequences).to(device)
        with self.clock.measure("draft", device):
            proposal = self._propose(slots_B, uniforms_BU[:, : self.num_draft])
        checked = None
        if self.check is not None:
            uniforms_BK = uniforms_BU[:, : self.num_draft]
            checked = self.check(proposal, slots_B=slots_B, sampling=self.sampling, uniforms_BK=uniforms_BK)
            proposal = checked.proposal
        if self.proposer is not None and self.confidence_threshold > 0:
            proposal = cut(proposal, self.confidence_threshold)
        with self.clock.measure("verify", device):
            verdict, step = self._score(slots_B, last_B, position_B, proposal, uniforms_BU[:, self.num_draft :])
        return self._settle(slots_B, sequences, proposal, checked, verdict, step)

    def _score(
        self, slots_B: Tensor, last_B: Tensor, position_B: Tensor, proposal: Proposal, uniforms_BU: Tensor
    ) -> tuple[Verdict, TargetStep]:
        """The target's pass over a proposal, what is committed, and the pass as it is of committed tokens.

        Of the uniforms, K are for acceptance, one for the target's own token.
        """
        if proposal.parents is not None:
            return score_tree(
                self.target, slots_B, last_B, position_B, proposal, self.taps,
                sampling=self.sampling, uniforms=uniforms_BU, stop_ids=self.stop_ids,
            )  # fmt: skip
        ids_BT = torch.cat([last_B[:, None], proposal.tokens], dim=1)
        offsets_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        positions_BT = (position_B[:, None] + offsets_T).where(offsets_T <= proposal.lengths[:, None], -1)
        step = self.target.decode(slots_B, ids_BT, positions_BT, self.taps)
        # Fewer than K tokens may be proposed.
        uniforms_BU = torch.cat([uniforms_BU[:, : proposal.tokens.shape[1]], uniforms_BU[:, -1:]], dim=1)
        verdict = verify(step.logits, proposal, sampling=self.sampling, uniforms=uniforms_BU, stop_ids=self.stop_ids)
        self.target.commit(slots_B, position_B + verdict.committed)
        return verdict, step

    def _propose(self, slots_B: Tensor, uniforms_BK: Tensor) -> Proposal:
        if self.proposer is None or self.check is None:
            nothing = torch.zeros(len(slots_B), 0, dtype=torch.long, device=slots_B.device)
            return Proposal(tokens=nothing, lengths=nothing.sum(1))
        limits_B = torch.full_like(slots_B, self.num_draft)
        # Copies: a proposer that writes into what it is given changes nothing that the engine reads later.
        with self.check.calling("propose"):
            return self.proposer.propose(slots_B.clone(), limits_B, self.sampling, uniforms_BK.clone(), self.stop_ids)

    def _uniforms(self, sequences: list[_Sequence]) -> Tensor:
        """Uniform numbers [B, 2K + 1].

        Their count is the same in every round, so draws do not depend on other sequences.
        """
        width = 2 * self.num_draft + 1
        if self.sampling.temperature == 0:
            return torch.zeros(len(sequences), width)
        return torch.from_numpy(np.stack([sequence.random.random(width) for sequence in sequences]))

    def _settle(
        self,
        slots_B: Tensor,
        sequences: list[_Sequence],
        proposal: Proposal,
        checked: Checked | None,
        verdict: Verdict,
        step: TargetStep,
    ) -> list[Completion]:
        """Append committed tokens, finish sequences that are over, and tell the proposer about the others."""
        to_read = torch.stack([verdict.proposal_lengths, verdict.accepted, verdict.committed], dim=1)
        if checked is not None:  # the lengths as they were given come first
            to_read = torch.cat([to_read, checked.to_read], dim=1)
        counts = to_read.tolist()
        if self.check is not None and checked is not None:
            self.check.refuse(checked, [row[3:] for row in counts])
        tokens = verdict.tokens.tolist()
        confidence = None if proposal.confidence is None else proposal.confidence.tolist()
        if self.check is not None and confidence is not None:
            for row, values in enumerate(confidence):
                self.check.refuse_confidence(values[: counts[row][0]], row)
        done, alive = [], []
        for row, (slot, sequence) in enumerate(zip(list(self.active), sequences, strict=True)):
            proposed, accepted, committed = counts[row][:3]
            survival = None if confidence is None else tuple(confidence[row][:proposed])
            nodes = None if proposal.parents is None else counts[row][3]
            sequence.rounds.append(Round(proposed, accepted, committed, survival, nodes))
            before = len(sequence.output)
            sequence.output += tokens[row][:committed]
            self._tell(sequence, before, accepted)
            stopped = sequence.output[-1] in self.stop_ids
            if stopped or len(sequence.output) > sequence.limit:
                del self.active[slot]
                done.append(self._finish(slot, sequence))
            else:
                alive.append(row)
        if self.proposer and self.check:
            with self.clock.measure("draft", self.target.device), self.check.calling("accept"):
                seen_BKC = features_for(self.proposer, step)
                if len(alive) < len(sequences):
                    rows = torch.tensor(alive, dtype=torch.long, device=slots_B.device)
                    slots_B, seen_BKC = slots_B[rows], seen_BKC[rows]
                    committed_B, tokens_BK = verdict.committed[rows], verdict.tokens[rows]
                else:
                    committed_B, tokens_BK = verdict.committed, verdict.tokens
                if alive:
                    self.proposer.accept(slots_B, tokens_BK, committed_B, seen_BKC)
        return done

    def _tell(self, sequence: _Sequence, before: int, accepted: int) -> None:
        """Report the output from index `before` on, up to the limit."""
        fresh = tuple(sequence.output[before : sequence.limit])
        if self.on_round is not None and fresh:
            self.on_round(Committed(sequence.request.id, fresh, min(accepted, len(fresh))))

    def _finish(self, slot: int, sequence: _Sequence) -> Completion:
        freed = torch.tensor([slot], device=self.target.device)
        self.target.commit(freed, torch.zeros_like(freed))
        if self.proposer and self.check:
            with self.check.calling("free"):
                self.proposer.free(freed)
        output = sequence.output[: sequence.limit]
        return Completion(
            id=sequence.request.id,
            prompt_ids=sequence.request.prompt_ids,
            output_ids=tuple(output),
            finish_reason="stop" if output[-1] in self.stop_ids else "length",
            rounds=tuple(sequence.rounds),
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
