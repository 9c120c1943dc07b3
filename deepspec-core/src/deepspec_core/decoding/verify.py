"""Lossless verification of a chain of draft tokens, batched over sequences.

Left to right, draft token d_k is accepted with probability min(1, p_k(d_k) / q_k(d_k)). At the first rejection the
target's own token is drawn from normalise(max(p - q, 0)). If all are accepted, it is drawn from the target's
distribution after the last (Leviathan et al. 2023, Chen et al. 2023). At temperature 0 both distributions are one-hot
at the argmax. Knows distributions. Does not know where they come from, or what a round does with the outcome.

Legend: B sequences, K draft tokens at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.sampling import distribution, draw


@frozen(kw_only=True, eq=False)
class Verdict:
    """What one round commits.

    accepted: [B], the number of accepted draft tokens.
    committed: [B], the number of tokens that the round adds: the accepted ones and the target's own. The target's own
        is missing if an accepted draft token is a stop token.
    tokens: [B, K+1], the committed tokens, right-padded.
    proposal_lengths: [B], the number of draft tokens that count as proposed: those up to an accepted stop token. Of a
        tree: those of its longest path.
    path: [B, K+1], of a tree: the target's columns of the last committed token and of the accepted ones, in order. None
        in a chain, where they are the first columns.
    """

    accepted: Tensor
    committed: Tensor
    tokens: Tensor
    proposal_lengths: Tensor
    path: Tensor | None = None


def verify(
    logits_BKV: Tensor, proposal: Proposal, *, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
) -> Verdict:
    """Decide a round.

    logits [B, K+1, V] are the target's after [last committed, d_1..d_K]. Of the uniforms [B, K+1] in [0, 1), column k-1
    decides about d_k, and the last column draws the target's own token.
    """
    tokens_BK, lengths_B = proposal.tokens, proposal.lengths
    num_draft = tokens_BK.shape[1]
    proposed_BK = torch.arange(num_draft, device=tokens_BK.device) < lengths_B[:, None]
    if sampling.temperature == 0:
        # Both distributions are one-hot, so argmaxes are compared and the draft's probabilities are not read.
        best_BK = logits_BKV.argmax(-1)
        accepted_B = _leading(proposed_BK & (tokens_BK == best_BK[:, :num_draft]))
        own_B = best_BK.gather(1, accepted_B[:, None])[:, 0]
    else:
        target_BKV = distribution(logits_BKV, sampling)
        p_BK = target_BKV[:, :num_draft].gather(2, tokens_BK[..., None])[..., 0]
        q_BK = (
            torch.ones_like(p_BK)
            if proposal.probabilities is None
            else proposal.probabilities.gather(2, tokens_BK[..., None])[..., 0]
        )
        # u < p / q without a division. q is never 0 at a token that was drawn from it.
        accepted_B = _leading(proposed_BK & (uniforms[:, :num_draft].to(p_BK.dtype) * q_BK < p_BK))
        own_B = draw(_residual(target_BKV, proposal, accepted_B), uniforms[:, num_draft])
    return outcome(tokens_BK, accepted_B, own_B, lengths_B, stop_ids=stop_ids)


def outcome(
    tokens_BK: Tensor,
    accepted_B: Tensor,
    own_B: Tensor,
    lengths_B: Tensor,
    *,
    stop_ids: Sequence[int],
    path_BK: Tensor | None = None,
) -> Verdict:
    """The verdict where accepted[b] of the tokens [B, K] are accepted and own [B] are the target's own.

    It ends at an accepted stop token. `lengths` [B] are those of the proposals.
    """
    num_draft = tokens_BK.shape[1]
    stop_BK = torch.zeros_like(tokens_BK, dtype=torch.bool)
    for stop_id in stop_ids:
        stop_BK |= tokens_BK == stop_id
    stop_BK &= torch.arange(num_draft, device=tokens_BK.device) < accepted_B[:, None]
    before_stop_B = _leading(~stop_BK)
    stopped_B = before_stop_B < num_draft
    accepted_B = torch.where(stopped_B, before_stop_B + 1, accepted_B)
    tokens = torch.cat([tokens_BK, own_B[:, None]], dim=1)
    tokens.scatter_(
        1, accepted_B[:, None], torch.where(stopped_B, tokens.gather(1, accepted_B[:, None])[:, 0], own_B)[:, None]
    )
    return Verdict(
        accepted=accepted_B,
        committed=accepted_B + (~stopped_B).long(),
        tokens=tokens,
        proposal_lengths=torch.where(stopped_B, accepted_B, lengths_B),
        path=path_BK,
    )


def _leading(flags_BK: Tensor) -> Tensor:
    """The number of leading entries that are true, [B]."""
    return flags_BK.long().cumprod(1).sum(1)


def _residual(target_BKV: Tensor, proposal: Proposal, accepted_B: Tensor) -> Tensor:
    """The distribution of the target's own token, [B, V]: max(p - q, 0), normalised, after a rejection, else p."""
    index_B11 = accepted_B[:, None, None]
    p_BV = target_BKV.gather(1, index_B11.expand(-1, 1, target_BKV.shape[2]))[:, 0]
    num_draft = proposal.tokens.shape[1]
    if num_draft == 0:
        return p_BV
    rejected_B = accepted_B < proposal.lengths
    at_B = accepted_B.clamp(max=num_draft - 1)
    if proposal.probabilities is None:
        q_BV = torch.zeros_like(p_BV).scatter_(1, proposal.tokens.gather(1, at_B[:, None]), 1.0)
    else:
        q_BV = proposal.probabilities.gather(1, at_B[:, None, None].expand(-1, 1, p_BV.shape[1]))[:, 0].to(p_BV.dtype)
    rest_BV = (p_BV - q_BV).clamp(min=0)
    mass_B1 = rest_BV.sum(1, keepdim=True)
    # If p equals q up to rounding, nothing is left. The rejection is then due to rounding too, and p is right.
    use_B1 = rejected_B[:, None] & (mass_B1 > 0)
    return torch.where(use_B1, rest_BV / mass_B1.clamp(min=torch.finfo(p_BV.dtype).tiny), p_BV)
