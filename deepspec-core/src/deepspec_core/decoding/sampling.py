"""From logits to a distribution, and from a distribution and a uniform number to a token.

Every row is treated alone, so a sample's tokens do not depend on its neighbours. Owns no random numbers: callers give
uniforms. Targets and drafts go through the same functions, as lossless verification needs.

Legend: ... any leading dimensions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Sampling

__all__ = ["distribution", "draw"]


def distribution(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution tokens are drawn from: logits [..., V] -> probabilities [..., V] fp32, each row summing to 1.

    Temperature, then top-k (ties with the k-th logit stay), then top-p (the shortest descending prefix whose mass
    reaches p, equal tokens in order of id), then min-p (relative to the most likely token). Temperature 0 is one-hot at
    the argmax, the first of equals.
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
    """Tokens by inverse CDF: the first token whose cumulative mass exceeds u times the total.

    probs [..., V], each row with some mass (it need not sum to 1); uniforms [...] in [0, 1) -> ids [...] int64. A token
    of probability zero is never returned, however close u is to 1.
    """
    mass_V = probs_V.cumsum(dim=-1, dtype=torch.float64)
    possible_V = probs_V > 0
    # A parallel sum need not be monotone to the last bit, so tokens are compared rather than searched for.
    reached_V = possible_V & (mass_V > uniforms.double().unsqueeze(-1) * mass_V[..., -1:])
    first = reached_V.int().argmax(dim=-1)
    last_possible = probs_V.shape[-1] - 1 - possible_V.flip(-1).int().argmax(dim=-1)
    return torch.where(reached_V.any(dim=-1), first, last_possible)
