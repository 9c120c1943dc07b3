"""The candidate selector: scores of a slot's candidate tokens, given the token before them.

S(a, b) = U(b) + <A(a) * P(h), B(b)>, where a is the token before, b the candidate, U the head's logit, h the slot's
hidden state, P a projection, and A and B are codebooks. Knows hidden states, tokens and logits. Does not know blocks,
losses, or how tokens are drawn.

Legend: ... any leading dimensions, N rows, C candidates, H hidden size, r rank, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from deepspec_core.contracts.target import TargetArchitecture
from deepspec_core.layers.decoder_layer import initialise

# Logits, or numbers of the head's rows, that are held at once while training: 64 MiB in fp32.
_AT_ONCE = 2**24
Logits = Callable[[Tensor], Tensor]


class CandidateSelector(nn.Module):
    """With its initial weights it adds nothing to the head's logits, because the successors' codebook is 0."""

    def __init__(self, target: TargetArchitecture, rank: int) -> None:
        super().__init__()
        self.hidden_projection = nn.Linear(target.hidden_size, rank, bias=False)
        self.predecessor_codebook = nn.Parameter(torch.empty(target.vocab_size, rank).normal_())
        self.successor_codebook = nn.Parameter(torch.zeros(target.vocab_size, rank))
        initialise(self.hidden_projection, target.initializer_range)

    def forward(self, logits_C: Tensor, tokens_C: Tensor, hidden_H: Tensor, previous: Tensor) -> Tensor:
        """Scores [..., C] of tokens [..., C] with these logits, after the tokens `previous` [...]."""
        query_r = embedding(previous, self.predecessor_codebook) * self.hidden_projection(hidden_H)
        return logits_C + (embedding(tokens_C, self.successor_codebook) * query_r[..., None, :]).sum(-1)


@torch.no_grad()
def candidates(hidden_NH: Tensor, labels_N: Tensor, logits: Logits, most: int, vocab_size: int) -> Tensor:
    """The `most` most probable tokens of each row, [N, C]; a label that is none of them stands in the last one's place.

    The logits of few rows stand at once.
    """
    parts = hidden_NH.split(max(1, _AT_ONCE // vocab_size))
    tokens_NC = torch.cat([logits(part_nH).topk(most).indices for part_nH in parts])
    missing_N = (tokens_NC != labels_N[:, None]).all(-1)
    tokens_NC[:, -1] = torch.where(missing_N, labels_N, tokens_NC[:, -1])
    return tokens_NC


def logits_at(tokens_NC: Tensor, hidden_NH: Tensor, head_VH: Tensor) -> Tensor:
    """<head[token], h>, [N, C], for a frozen head. The head's rows are gathered for few rows at once, and again in
    backward.
    """

    def of_some(tokens_nC: Tensor, hidden_nH: Tensor) -> Tensor:
        return (head_VH[tokens_nC] * hidden_nH[:, None]).sum(-1)

    rows = max(1, _AT_ONCE // (tokens_NC.shape[1] * head_VH.shape[1]))
    parts = zip(tokens_NC.split(rows), hidden_NH.split(rows), strict=True)
    return torch.cat([checkpoint(of_some, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
