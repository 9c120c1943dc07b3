"""A language model that proposes tokens, one forward pass a token, with a key-value cache of its own.

Works on any contracts.target.TargetModel. In each round it reads the committed tokens that it has not read yet, then
its own draws. Verification may reject some of these, so the cache then goes back to the last accepted one.

The model may have fewer positions than the target. It proposes nothing that it would have to look past them for, and
for a prompt that fills them nothing at all. Its vocabulary may be of another size: ids that only the target has get
probability 0, and ids that only the model has are never drawn.

Legend: B slots in a call, R of them that the model runs on, T tokens, K proposed tokens at most, D the model's
vocabulary, V the target's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field
from torch import Tensor
from torch.nn.functional import pad

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.contracts.target import TargetModel
from deepspec_core.decoding.sampling import next_token


@define
class _Sequence:
    """`read`: tokens in the cache that are committed. `unread`: the committed tokens after them, none once proposed.

    `own`: the tokens of the last proposal that the cache holds after these. `last`: the last committed token.
    """

    read: int
    unread: list[int]
    last: int
    own: list[int] = field(factory=list)

    def go_back(self) -> None:
        """A proposal that nothing came of is forgotten: the last committed token is read again."""
        if not self.unread:
            self.read, self.unread, self.own = self.read - 1, [self.last], []


class SmallLMProposer:
    """`vocab_size` is the target's."""

    taps: tuple[int, ...] = ()

    def __init__(self, model: TargetModel, *, max_tokens: int, vocab_size: int) -> None:
        self.model, self.max_tokens, self.vocab_size = model, max_tokens, vocab_size
        self.positions = model.architecture.max_positions
        self.sequences: dict[int, _Sequence] = {}

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Make room, for no more positions than the model has."""
        self.model.open_slots(num_slots, min(max_length, self.positions))
        self.sequences = {}

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        """Read the prompts together, without those that leave no position for the first token."""
        self.free(slots)
        fitting = lengths < self.positions
        told = zip(slots.tolist(), lengths.tolist(), first_token.tolist(), fitting.tolist(), strict=True)
        for slot, length, token, fits in told:
            if fits:
                self.sequences[slot] = _Sequence(read=length, unread=[token], last=token)
        if not fitting.any():
            return
        slots, lengths, prompt_ids = slots[fitting], lengths[fitting], prompt_ids[fitting]
        columns_T = torch.arange(int(lengths.max()), device=slots.device)
        positions_RT = columns_T.expand(len(slots), -1)
        positions_RT = positions_RT.where(positions_RT < lengths[:, None], -1)
        self.model.decode(slots, self._known(prompt_ids[:, : len(columns_T)]), positions_RT, (), last_only=True)
        self.model.commit(slots, lengths)

    @torch.no_grad()
    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """Draw token k from the model's distribution with column k of `uniforms`."""
        sequences = [self.sequences.get(slot) for slot in slots.tolist()]
        self._go_back(slots, sequences)
        lengths = [
            0 if one is None else min(limit, self.max_tokens, max(0, self.positions - one.read - len(one.unread) + 1))
            for one, limit in zip(sequences, limits.tolist(), strict=True)
        ]
        device, width = slots.device, max(lengths)
        tokens_BK = torch.zeros(len(slots), width, dtype=torch.long, device=device)
        q_BKV: Tensor | None = None
        for k in range(width):
            chosen = [row for row, length in enumerate(lengths) if length > k]
            rows_R = torch.tensor(chosen, device=device)
            running = [one for row in chosen if (one := sequences[row]) is not None]
            if k == 0:
                news = [one.unread for one in running]
            else:
                news = [[token] for token in tokens_BK[rows_R, k - 1].tolist()]
            logits_RV = self._read(slots[rows_R], running, news)
            before_Rk = tokens_BK[rows_R, :k]
            tokens_BK[rows_R, k], q_RV = next_token(
                logits_RV, sampling.of(rows_R).after(before_Rk), uniforms[rows_R, k]
            )
            if q_RV is not None:
                q_BKV = q_RV.new_zeros(len(slots), width, self.vocab_size) if q_BKV is None else q_BKV
                q_BKV[rows_R, k] = q_RV
            for one, new in zip(running, news, strict=True):
                if k == 0:
                    one.read, one.unread, one.own = one.read + len(one.unread), [], []
                else:
                    one.own += new
        return Proposal(tokens=tokens_BK, lengths=torch.tensor(lengths, device=device), probabilities=q_BKV)

    def _go_back(self, slots: Tensor, sequences: Sequence[_Sequence | None]) -> None:
        """Where `propose` is asked again before `accept`: what was proposed before leaves the cache."""
        again = [row for row, one in enumerate(sequences) if one is not None and not one.unread]
        if again:
            running = [one for row in again if (one := sequences[row]) is not None]
            for one in running:
                one.go_back()
            rows_R = torch.tensor(again, device=slots.device)
            self.model.commit(slots[rows_R], torch.tensor([one.read for one in running], device=slots.device))

    def _read(self, slots_R: Tensor, running: Sequence[_Sequence], news: Sequence[Sequence[int]]) -> Tensor:
        """Logits [R, V] after new tokens, which are then in the cache."""
        starts_R1 = torch.tensor([[one.read + len(one.own)] for one in running])
        longest = max(map(len, news))
        ids_RT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in news])
        counts_R1 = torch.tensor([[len(ids)] for ids in news])
        columns_T = torch.arange(longest)
        positions_RT = (starts_R1 + columns_T).where(columns_T < counts_R1, -1)
        device = slots_R.device
        step = self.model.decode(slots_R, self._known(ids_RT.to(device)), positions_RT.to(device), (), last_only=True)
        self.model.commit(slots_R, (starts_R1 + counts_R1)[:, 0].to(device))
        logits_RV: Tensor = step.logits[:, 0, : self.vocab_size]
        return pad(logits_RV, (0, self.vocab_size - logits_RV.shape[-1]), value=float("-inf"))

    def _known(self, ids: Tensor) -> Tensor:
        """Padding in place of ids that the model's vocabulary does not have; the target hardly ever draws one."""
        architecture = self.model.architecture
        return ids.where(ids < architecture.vocab_size, architecture.pad_token_id)

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        """Keep what the cache holds of accepted tokens. The other committed ones are read in the next round."""
        kept_slots, kept_lengths = [], []
        for slot, ids, count in zip(slots.tolist(), committed_ids.tolist(), committed.tolist(), strict=True):
            one = self.sequences.get(slot)
            if one is None:
                continue
            one.last = ids[count - 1]
            if one.unread:  # nothing was proposed
                one.unread += ids[:count]
                continue
            right = 0
            while right < min(count - 1, len(one.own)) and one.own[right] == ids[right]:
                right += 1
            one.read, one.unread, one.own = one.read + right, ids[right:count], []
            kept_slots.append(slot)
            kept_lengths.append(one.read)
        if kept_slots:
            device = slots.device
            self.model.commit(torch.tensor(kept_slots, device=device), torch.tensor(kept_lengths, device=device))

    def free(self, slots: Tensor) -> None:
        """Forget these sequences."""
        for slot in slots.tolist():
            self.sequences.pop(slot, None)
        self.model.commit(slots, torch.zeros_like(slots))
