"""Turns logits into a distribution, and a distribution and a uniform number into a token.

Every row is computed by itself, so a sequence's tokens do not depend on other sequences. Callers give the uniform
numbers. Targets and drafts use the same functions, which lossless verification requires.

Legend: ... any leading dimensions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Sampling

__all__ = ["distribution", "draw"]


def distribution(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that tokens are drawn from: logits [..., V] to probabilities [..., V] in fp32, each row of sum
    1.

    Temperature is applied first. Then top-k keeps the k greatest logits, and those equal to the k-th. Then top-p keeps
    the fewest most probable tokens whose sum reaches p, equal ones in the order of ids. Then min-p keeps tokens by
    their ratio to the most probable one. Temperature 0 gives a one-hot at the argmax, the first of equals.
    """
    if sampling.temperature == 0:
        one_hot_V = torch.zeros_like(logits_V, dtype=torch.float32)
        return one_hot_V.scatter_(-1, logits_V.argmax(dim=-1, keepdim=True), 1.0)
    logits_V = logits_V.float() / sampling.temperature
    if 0 < sampling.top_k < logits_V.shape[-1]:
        kth_1 = logits_V.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits_V = logits_V.masked_fill(logits_V < kth_1, -torch.inf)
    probs_V = logits_V.softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probs_V.sort(dim=-1, descending=True, stable=True)
        mass_before_V = sorted_V.cumsum(dim=-1, dtype=torch.float64) - sorted_V
        beyond_V = mass_before_V >= sampling.top_p
        beyond_V[..., 0] = False
        probs_V = probs_V.masked_fill(torch.empty_like(beyond_V).scatter_(-1, order_V, beyond_V), 0.0)
    if sampling.min_p > 0:
        floor_1 = sampling.min_p * probs_V.amax(dim=-1, keepdim=True)
        probs_V = probs_V.masked_fill(probs_V < floor_1, 0.0)
    return probs_V / probs_V.sum(dim=-1, keepdim=True)


def draw(probs_V: Tensor, uniforms: Tensor) -> Tensor:
    """Draw tokens by inverse CDF: each is the first whose cumulative probability exceeds u times the total.

    Takes probs [..., V] and uniforms [...] in [0, 1), and gives ids [...] int64. A row's sum must be above 0 and need
    not be 1. A token of probability 0 is never drawn, however close u is to 1.
    """
    mass_V = probs_V.cumsum(dim=-1, dtype=torch.float64)
    possible_V = probs_V > 0
    # A parallel cumulative sum may not be monotone to the last bit, so every token is compared, without binary search.
    reached_V = possible_V & (mass_V > uniforms.double().unsqueeze(-1) * mass_V[..., -1:])
    first = reached_V.int().argmax(dim=-1)
    last_possible = probs_V.shape[-1] - 1 - possible_V.flip(-1).int().argmax(dim=-1)
    return torch.where(reached_V.any(dim=-1), first, last_possible)
