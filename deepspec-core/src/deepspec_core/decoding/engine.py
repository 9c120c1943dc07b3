"""Decoding in rounds. A proposer proposes tokens, the target verifies them, and the next prompt takes a free slot.

The engine owns the target's cache, verifies, watches for stop tokens and refills slots. It knows no algorithm. Without
a proposer it decodes plainly, one token a round, with the same code, so that the times of both can be compared. A
sequence's random numbers depend only on its own seed, never on the other sequences.

Legend: B sequences in a round, T tokens, K draft tokens of a path at most, M proposed tokens at most (K in a chain),
C = taps * H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from attrs import define, evolve, field
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling, features_for
from deepspec_core.contracts.target import TargetModel, TargetStep
from deepspec_core.decoding.clock import Clock as Clock
from deepspec_core.decoding.confidence import cut
from deepspec_core.decoding.proposal_check import Checked, ProposalCheck
from deepspec_core.decoding.sampling import pick
from deepspec_core.decoding.sequences import Committed as Committed
from deepspec_core.decoding.sequences import Completion as Completion
from deepspec_core.decoding.sequences import Request as Request
from deepspec_core.decoding.sequences import Round as Round
from deepspec_core.decoding.sequences import Underway
from deepspec_core.decoding.stop_text import StopText
from deepspec_core.decoding.tree import score_tree
from deepspec_core.decoding.verify import Verdict, verify


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
    stop_text: StopText | None = None,
    clock: Clock | None = None,
    on_round: Callable[[Committed], None] | None = None,
) -> Iterator[Completion]:
    """Continue every request. Completions are yielded as they finish.

    At most `batch_size` sequences are decoded at once, each of at most `max_length` tokens with its prompt. A prompt
    that leaves room for fewer than max_new_tokens gets as many as fit; a prompt that leaves no room is a ValueError.
    Another round starts while fewer than limit + 1 tokens are committed, as in the published loop; then the output is
    trimmed. Without a proposer no round goes beyond the limit.
    With a `confidence_threshold` above 0, each proposal ends before its first token of lower confidence. `on_round`
    gets every token of the output once, in the order of the sequence. With `stop_text`, an output ends with the token
    that completes one of its strings; its last round counts whole, as at the limit.

    Raises PluginError if the proposer returns what cannot be verified (proposal_check.py). What it returns can cost
    speed, and never changes an output: tokens of such a round are not committed.
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
        stop_text,
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
    stop_text: StopText | None
    clock: Clock
    on_round: Callable[[Committed], None] | None
    active: dict[int, Underway] = field(factory=dict)
    seen_SV: Tensor | None = None

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
        if self.sampling.repetition_penalty != 1:
            vocab_size = self.target.architecture.vocab_size
            self.seen_SV = torch.zeros(self.batch_size, vocab_size, dtype=torch.bool, device=self.target.device)
        exhausted = False
        while True:
            start = self.clock.now()
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
            self.clock.wall += self.clock.now() - start
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
        if self.seen_SV is not None:
            self.seen_SV[slots_B] = False
            for slot, request in fresh.items():
                self.seen_SV[slot, torch.tensor(request.prompt_ids, device=device)] = True
        uniforms_B = torch.zeros(len(fresh), device=device)
        if self.sampling.temperature > 0:
            uniforms_B = torch.tensor([generator.random() for generator in generators], device=device)
        first_B = pick(step.logits[:, 0], self._sampling_of(slots_B), uniforms_B)
        self._see(slots_B, first_B[:, None], torch.ones_like(first_B))
        first, done, alive = first_B.tolist(), [], []
        for row, (slot, request) in enumerate(fresh.items()):
            limit = min(self.max_new_tokens, self.max_length - lengths[row])
            sequence = Underway(
                request=request,
                limit=limit,
                enough=limit if self.proposer is None else limit + 1,
                random=generators[row],
                watch=None if self.stop_text is None else self.stop_text.watch(),
            )
            sequence.append(first[row : row + 1], self.stop_ids)
            self._tell(sequence, 0, 0)
            if sequence.done:
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

    def _sampling_of(self, slots_B: Tensor) -> Sampling:
        """The sampling in these slots. Tensors are copies: whoever writes into them changes nothing here."""
        return self.sampling if self.seen_SV is None else evolve(self.sampling, seen=self.seen_SV[slots_B])

    def _see(self, slots_B: Tensor, tokens_BK: Tensor, counts_B: Tensor) -> None:
        """Mark the first counts[b] of the tokens as seen in slots[b], for the repetition penalty."""
        if self.seen_SV is None:
            return
        counted_BK = torch.arange(tokens_BK.shape[1], device=counts_B.device) < counts_B[:, None]
        seen_BV = self._sampling_of(slots_B).after(tokens_BK, counted_BK).seen
        assert seen_BV is not None, "it began with some"
        self.seen_SV[slots_B] = seen_BV

    def _round(self) -> list[Completion]:
        """One proposal and one verification for every active slot, in ascending order of slots."""
        device = self.target.device
        self.active = dict(sorted(self.active.items()))
        sequences = list(self.active.values())
        known = [list(self.active), [one.output[-1] for one in sequences], [one.position for one in sequences]]
        slots_B, last_B, position_B = torch.tensor(known, device=device)
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
        """The target's pass over a proposal, the verdict, and the part of the pass that belongs to committed tokens.

        Of the uniforms, K decide about acceptance, and one draws the target's own token.
        """
        sampling = self._sampling_of(slots_B)
        if proposal.parents is not None:
            return score_tree(
                self.target, slots_B, last_B, position_B, proposal, self.taps,
                sampling=sampling, uniforms=uniforms_BU, stop_ids=self.stop_ids,
            )  # fmt: skip
        ids_BT = torch.cat([last_B[:, None], proposal.tokens], dim=1)
        offsets_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        positions_BT = (position_B[:, None] + offsets_T).where(offsets_T <= proposal.lengths[:, None], -1)
        step = self.target.decode(slots_B, ids_BT, positions_BT, self.taps)
        # Fewer than K tokens may be proposed.
        uniforms_BU = torch.cat([uniforms_BU[:, : proposal.tokens.shape[1]], uniforms_BU[:, -1:]], dim=1)
        verdict = verify(step.logits, proposal, sampling=sampling, uniforms=uniforms_BU, stop_ids=self.stop_ids)
        self.target.commit(slots_B, position_B + verdict.committed)
        return verdict, step

    def _propose(self, slots_B: Tensor, uniforms_BK: Tensor) -> Proposal:
        if self.proposer is None or self.check is None:
            nothing = torch.zeros(len(slots_B), 0, dtype=torch.long, device=slots_B.device)
            return Proposal(tokens=nothing, lengths=nothing.sum(1))
        limits_B = torch.full_like(slots_B, self.num_draft)
        # Copies: a proposer that writes into what it is given changes nothing that the engine reads later.
        with self.check.calling("propose"):
            sampling = self._sampling_of(slots_B)
            return self.proposer.propose(slots_B.clone(), limits_B, sampling, uniforms_BK.clone(), self.stop_ids)

    def _uniforms(self, sequences: list[Underway]) -> Tensor:
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
        sequences: list[Underway],
        proposal: Proposal,
        checked: Checked | None,
        verdict: Verdict,
        step: TargetStep,
    ) -> list[Completion]:
        """Append committed tokens, finish sequences that are over, and tell the proposer about the others."""
        counts_B3 = torch.stack([verdict.proposal_lengths, verdict.accepted, verdict.committed], dim=1)
        to_read = [counts_B3, verdict.tokens, *([] if checked is None else [checked.to_read])]
        # All values are read at once, because every read waits for the device.
        read, width = torch.cat(to_read, dim=1).tolist(), verdict.tokens.shape[1]
        counts, tokens, given = (
            [numbers[part] for numbers in read] for part in (slice(3), slice(3, 3 + width), slice(3 + width, None))
        )
        if self.check is not None and checked is not None:
            self.check.refuse(checked, given)
        self._see(slots_B, verdict.tokens, verdict.committed)
        confidence = None if proposal.confidence is None else proposal.confidence.tolist()
        done, alive = [], []
        for row, (slot, sequence) in enumerate(zip(list(self.active), sequences, strict=True)):
            proposed, accepted, committed = counts[row]
            survival = None if confidence is None else tuple(confidence[row][:proposed])
            nodes = None if proposal.parents is None else given[row][0]  # the lengths come first
            sequence.rounds.append(Round(proposed, accepted, committed, survival, nodes))
            before = len(sequence.output)
            sequence.append(tokens[row][:committed], self.stop_ids)
            self._tell(sequence, before, accepted)
            if sequence.done:
                del self.active[slot]
                done.append(self._finish(slot, sequence))
            else:
                alive.append(row)
        if self.proposer and self.check:
            with self.clock.measure("draft", self.target.device), self.check.calling("accept"):
                seen_BKC = features_for(self.proposer, step)
                if len(alive) < len(sequences):
                    alive_B = torch.tensor(alive, dtype=torch.long, device=slots_B.device)
                    slots_B, seen_BKC = slots_B[alive_B], seen_BKC[alive_B]
                    committed_B, tokens_BK = verdict.committed[alive_B], verdict.tokens[alive_B]
                else:
                    committed_B, tokens_BK = verdict.committed, verdict.tokens
                if alive:
                    self.proposer.accept(slots_B, tokens_BK, committed_B, seen_BKC)
        return done

    def _tell(self, sequence: Underway, before: int, accepted: int) -> None:
        """Report the tokens of the output from index `before` on, up to the limit, to `on_round`."""
        fresh = tuple(sequence.output[before : sequence.limit])
        if self.on_round is not None and fresh:
            self.on_round(Committed(sequence.request.id, fresh, min(accepted, len(fresh))))

    def _finish(self, slot: int, sequence: Underway) -> Completion:
        freed = torch.tensor([slot], device=self.target.device)
        self.target.commit(freed, torch.zeros_like(freed))
        if self.proposer and self.check:
            with self.check.calling("free"):
                self.proposer.free(freed)
        return sequence.completion()
