"""The two heads: a low-rank correction of a slot's logits by the token before it, and the slot's confidence.

Know the backbone's outputs and previous tokens; not blocks, losses, nor how tokens are drawn. Attributes are named as
published checkpoints name their weights.

Legend: ... any leading dimensions, N blocks, K slots, H hidden size, V the target's vocabulary, D the draft's, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec_core.layers.decoder_layer import initialise


class MarkovHead(nn.Module):
    """correction = W1[previous token], [..., r]; the logits gain W2 correction. The base of the other two."""

    def __init__(self, vocab_size: int, head_rows: int, hidden_size: int, rank: int) -> None:
        """Any of `vocab_size` tokens, V, may come before a slot; `head_rows` are corrected, D."""
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, head_rows, bias=False)

    def forward(self, hidden_NKH: Tensor, embedded_NKr: Tensor) -> Tensor:
        """The corrections [N, K, r] of whole blocks, given W1 of the token before every slot."""
        # Without recurrence a step takes all slots at once, and nothing reads the state.
        return self.step(hidden_NKH, embedded_NKr, embedded_NKr)[0]

    def start(self, embedded_r: Tensor) -> Tensor:
        """The state before slot 0, [..., r]."""
        return torch.zeros_like(embedded_r)

    def step(self, hidden_H: Tensor, embedded_r: Tensor, state_r: Tensor) -> tuple[Tensor, Tensor]:
        """One slot: (correction, next state). Without recurrence the state passes through."""
        return embedded_r, state_r


class GatedHead(MarkovHead):
    """correction = sigmoid(gate_proj([h ; e])) * e, where e = W1[previous token]."""

    def __init__(self, vocab_size: int, head_rows: int, hidden_size: int, rank: int) -> None:
        super().__init__(vocab_size, head_rows, hidden_size, rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(self, hidden_H: Tensor, embedded_r: Tensor, state_r: Tensor) -> tuple[Tensor, Tensor]:
        """One slot."""
        gate_r = torch.sigmoid(self.gate_proj(torch.cat([hidden_H, embedded_r], dim=-1)))
        return gate_r * embedded_r, state_r


class RecurrentHead(MarkovHead):
    """A state that runs left to right inside one block, from zero.

    (gate, candidate, out) = joint_proj([s ; e ; h]); s' = sigmoid(gate) s + (1 - sigmoid(gate)) tanh(candidate);
    correction = tanh(out).
    """

    def __init__(self, vocab_size: int, head_rows: int, hidden_size: int, rank: int) -> None:
        super().__init__(vocab_size, head_rows, hidden_size, rank)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def forward(self, hidden_NKH: Tensor, embedded_NKr: Tensor) -> Tensor:
        """The corrections of whole blocks: what does not depend on the state is projected for all slots at once."""
        state_part, rest = self.joint_proj.weight[:, : self.rank], self.joint_proj.weight[:, self.rank :]
        inputs_NK3r = nn.functional.linear(torch.cat([embedded_NKr, hidden_NKH], -1), rest, self.joint_proj.bias)
        state_Nr, corrections = self.start(embedded_NKr[:, 0]), []
        for inputs_N3r in inputs_NK3r.unbind(1):
            correction_Nr, state_Nr = _recur(inputs_N3r + nn.functional.linear(state_Nr, state_part), state_Nr)
            corrections.append(correction_Nr)
        return torch.stack(corrections, dim=1)

    def step(self, hidden_H: Tensor, embedded_r: Tensor, state_r: Tensor) -> tuple[Tensor, Tensor]:
        """One slot."""
        return _recur(self.joint_proj(torch.cat([state_r, embedded_r, hidden_H], dim=-1)), state_r)


def _recur(projected_3r: Tensor, state_r: Tensor) -> tuple[Tensor, Tensor]:
    gate_r, candidate_r, out_r = projected_3r.chunk(3, dim=-1)
    keep_r = torch.sigmoid(gate_r)
    return torch.tanh(out_r), keep_r * state_r + (1 - keep_r) * torch.tanh(candidate_r)


class ConfidenceHead(nn.Module):
    """logit = proj([h ; e]) or, without Markov features, proj(h): of survival, given that all slots before survive."""

    def __init__(self, num_features: int, *, stop_gradient: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(num_features, 1)
        self.stop_gradient = stop_gradient

    def forward(self, features_F: Tensor) -> Tensor:
        """[..., F] -> [...]."""
        logit_1: Tensor = self.proj(features_F.detach() if self.stop_gradient else features_F)
        return logit_1.squeeze(-1)


_HEADS = {"vanilla": MarkovHead, "gated": GatedHead, "rnn": RecurrentHead}


def new_markov_head(
    head: str, *, vocab_size: int, head_rows: int, hidden_size: int, rank: int, std: float
) -> MarkovHead:
    """A Markov head of this kind, with new weights."""
    made = _HEADS[head](vocab_size, head_rows, hidden_size, rank)
    initialise(made, std)
    return made
