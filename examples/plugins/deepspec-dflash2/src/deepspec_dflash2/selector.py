"""The candidate selector: scores of a slot's candidate tokens, given the token before them.

S(a, b) = U(b) + <A(a) * P(h), B(b)>, where U is the head's logit, h the slot's hidden state, and A and B are codebooks.
Knows hidden states, tokens and logits. Does not know blocks, losses, or how tokens are drawn.

Legend: ... any leading dimensions, N rows, C candidates, H hidden size, r rank, D tokens of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from deepspec_core.layers.decoder_layer import initialise

# Logits, or numbers of the head's rows, that are held at once while training: 64 MiB in fp32.
_AT_ONCE = 2**24


class CandidateSelector(nn.Module):
    """New, it adds nothing to the head's logits: the successors' codebook is 0."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, std: float) -> None:
        super().__init__()
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab_size, rank).normal_())
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        initialise(self.hidden_projection, std)

    def forward(self, logits_C: Tensor, tokens_C: Tensor, hidden_H: Tensor, previous: Tensor) -> Tensor:
        """Scores [..., C] of tokens [..., C] with these logits, after the tokens `previous` [...]."""
        query_r = embedding(previous, self.predecessor_codebook) * self.hidden_projection(hidden_H)
        return logits_C + (embedding(tokens_C, self.successor_codebook) * query_r[..., None, :]).sum(-1)


@torch.no_grad()
def best_columns(hidden_NH: Tensor, head: nn.Linear, most: int) -> Tensor:
    """The columns [N, C] of the head with the `most` greatest logits; the logits of few rows stand at once."""
    rows = max(1, _AT_ONCE // head.out_features)
    return torch.cat([head(part_nH).topk(most).indices for part_nH in hidden_NH.split(rows)])


def logits_at(columns_NC: Tensor, hidden_NH: Tensor, head_DH: Tensor) -> Tensor:
    """<head[column], h>, [N, C], for a frozen head. The head's rows are gathered for few rows at once, and again in
    backward.
    """

    def of_some(columns_nC: Tensor, hidden_nH: Tensor) -> Tensor:
        return (head_DH[columns_nC] * hidden_nH[:, None]).sum(-1)

    rows = max(1, _AT_ONCE // (columns_NC.shape[1] * head_DH.shape[1]))
    parts = zip(columns_NC.split(rows), hidden_NH.split(rows), strict=True)
    return torch.cat([checkpoint(of_some, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
