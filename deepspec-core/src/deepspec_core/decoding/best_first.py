"""The best tree with a given number of tokens: the paths that are most probable by the draft's own distributions.

A path's probability is the product of its tokens' probabilities, so no node is more probable than its parent, and the
most probable nodes form a tree. Of all trees of that size, it has the greatest expected accepted length if the draft's
distributions equal the target's. The search works level by level and reads no value on the host: a level can have at
most as many nodes as the whole tree. Knows distributions. Does not know drafts, or how a tree is verified.

Legend: B slots, W nodes of a level, E tokens after each, M nodes of a tree, V vocabulary, N candidates.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.sampling import distribution, penalised

__all__ = ["NextTokens", "best_first", "log_probabilities"]


class NextTokens(Protocol):
    """A draft's distributions for the tokens of one level of a tree, given the nodes of the level above."""

    def __call__(self, level: int, tokens_BW: Tensor | None, parents_BW: Tensor | None) -> Tensor:
        """Log-probabilities [B, W, V] of the token after each of the nodes; [B, 1, V] if they are the same for all.

        Levels come in order, from 0. `tokens` are the W nodes' own, `parents` where the node before each stood among
        the nodes of the call before. Both are None at level 0, whose one node is the last committed token.
        """
        ...


def best_first(next_tokens: NextTokens, *, nodes: int, longest: int, limits: Tensor) -> Proposal:
    """A tree of at most `nodes` tokens for each slot, its paths of at most `longest` and limits[b] tokens.

    `limits` [B] int64. Nodes come in the order of their probability; equal ones, the shallower first. Impossible tokens
    are left out, so a tree may be smaller.
    """
    score_BW = torch.zeros(len(limits), 1, device=limits.device)
    tokens_BW: Tensor | None = None
    parents_BW: Tensor | None = None
    scores, tokens, parents = [], [], []
    before, width = 0, 0
    for level in range(longest):
        given_BWV = next_tokens(level, tokens_BW, parents_BW).float()
        likeliest_B1E = None
        if given_BWV.shape[1] < score_BW.shape[1]:
            # The distribution is the same after all nodes, so only this many of its likeliest tokens are needed.
            given_BWV, likeliest_B1E = given_BWV.topk(min(nodes, given_BWV.shape[2]))
        each = given_BWV.shape[2]
        above_BW = score_BW.masked_fill(level >= limits[:, None], -torch.inf)
        children_BN = (above_BW[..., None] + given_BWV).flatten(1)
        score_BW, chosen_BW = children_BN.topk(min(nodes, children_BN.shape[1]))
        parents_BW, tokens_BW = chosen_BW // each, chosen_BW % each
        if likeliest_B1E is not None:
            tokens_BW = likeliest_B1E[:, 0].gather(1, tokens_BW)
        # Rounding may lift a log-probability above 0, and a child would then come before its parent.
        score_BW = torch.minimum(score_BW, above_BW.gather(1, parents_BW))
        scores.append(score_BW)
        tokens.append(tokens_BW)
        parents.append(parents_BW + before if level else torch.full_like(parents_BW, -1))
        before, width = width, width + score_BW.shape[1]
    return _of_the_best(scores, tokens, parents, nodes)


def log_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Logarithms of the draft's probabilities, [..., V] fp32: as it would draw; at temperature 0, as at temperature 1.

    A greedy target takes one token; the softmax at temperature 1 estimates how likely each token is to be that one. A
    repetition penalty applies to the committed tokens, [B, ..., V]. Tokens of the path itself get no penalty: this can
    change which tree is best, but never what is drawn.
    """
    logits_V = penalised(logits_V, sampling)
    if sampling.temperature == 0:
        return logits_V.float().log_softmax(-1)
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        # The same as the logarithm of the distribution, in a fraction of its time.
        return (logits_V.float() / sampling.temperature).log_softmax(-1)
    return distribution(logits_V, sampling).log()


def _of_the_best(scores: list[Tensor], tokens: list[Tensor], parents: list[Tensor], nodes: int) -> Proposal:
    """The `nodes` best of all levels' candidates, whose parents are indices among those."""
    score_BN, tokens_BN, parents_BN = (torch.cat(parts, dim=1) for parts in (scores, tokens, parents))
    # The sort is stable: a parent that is as probable as its child is of an earlier level, so it comes first.
    score_BN, order_BN = score_BN.sort(dim=1, descending=True, stable=True)
    columns_BN = torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN)
    rank_BN = torch.empty_like(order_BN).scatter_(1, order_BN, columns_BN)
    order_BM = order_BN[:, :nodes]
    above_BM = parents_BN.gather(1, order_BM)
    return Proposal(
        tokens=tokens_BN.gather(1, order_BM),
        parents=torch.where(above_BM < 0, -1, rank_BN.gather(1, above_BM.clamp(min=0))),
        lengths=score_BN[:, :nodes].isfinite().sum(1),
    )
