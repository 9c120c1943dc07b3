"""Lossless verification of a chain of draft tokens, batched over sequences.

Left to right, draft token d_k is accepted with probability min(1, p_k(d_k) / q_k(d_k)). At the first rejection the
target's own token is drawn from normalise(max(p - q, 0)). If all are accepted, it is drawn from the target's
distribution after the last (Leviathan et al. 2023, Chen et al. 2023). At temperature 0 both distributions are one-hot
at the argmax. Knows distributions. Does not know where they come from, or what a round does with the outcome.

Legend: B sequences, K draft tokens at most, N = B * K, R rows of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.sampling import chunks, distribution, draw, penalised, pick, totals


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
    if num_draft == 0:
        own_B = pick(logits_BKV[:, 0], sampling, uniforms[:, 0])
        none_B = torch.zeros_like(lengths_B)
        return Verdict(accepted=none_B, committed=none_B + 1, tokens=own_B[:, None], proposal_lengths=none_B)
    proposed_BK = torch.arange(num_draft, device=tokens_BK.device) < lengths_B[:, None]
    if sampling.temperature == 0 and sampling.seen is None:
        # Both distributions are one-hot, so argmaxes are compared and the draft's probabilities are not read.
        best_BK = logits_BKV.argmax(-1)
        accepted_B = _leading(proposed_BK & (tokens_BK == best_BK[:, :num_draft]))
        own_B = best_BK.gather(1, accepted_B[:, None])[:, 0]
    else:
        p_BK = _target_probabilities(logits_BKV, tokens_BK, sampling)
        if proposal.probabilities is None or sampling.temperature == 0:
            q_BK = torch.ones_like(p_BK)
        else:
            q_BKV = proposal.probabilities
            q_BK = q_BKV.gather(2, tokens_BK[..., None])[..., 0] / totals(q_BKV)
        # u < p / q without a division. q is never 0 at a token that was drawn from it.
        accepted_B = _leading(proposed_BK & (uniforms[:, :num_draft].to(p_BK.dtype) * q_BK < p_BK))
        own_B = _own_tokens(logits_BKV, proposal, accepted_B, sampling, uniforms[:, num_draft])
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
    before_stop_B = accepted_B
    if stop_ids:
        stop_BK = tokens_BK == stop_ids[0]
        for stop_id in stop_ids[1:]:
            stop_BK |= tokens_BK == stop_id
        before_stop_B = _leading(~stop_BK)
    goes_on_B = before_stop_B >= accepted_B
    accepted_B = torch.minimum(accepted_B, before_stop_B + 1)
    tokens = torch.cat([tokens_BK, own_B[:, None]], dim=1)
    # After an accepted stop token this is padding.
    tokens.scatter_(1, accepted_B[:, None], own_B[:, None])
    return Verdict(
        accepted=accepted_B,
        committed=accepted_B + goes_on_B,
        tokens=tokens,
        proposal_lengths=torch.where(goes_on_B, lengths_B, accepted_B),
        path=path_BK,
    )


def _leading(flags_BK: Tensor) -> Tensor:
    """The number of leading entries that are true, [B]."""
    return flags_BK.cumprod(1).sum(1)


def _target_probabilities(logits_BKV: Tensor, tokens_BK: Tensor, sampling: Sampling) -> Tensor:
    """The target's probability of each draft token after those before it, [B, K] fp32, some rows at a time."""
    batch, num_draft = tokens_BK.shape
    row_N = torch.arange(batch, device=tokens_BK.device).repeat_interleave(num_draft)
    at_N = torch.arange(num_draft, device=tokens_BK.device).repeat(batch)
    parts = []
    for some in chunks(len(row_N), logits_BKV):
        p_RV = _target(logits_BKV, tokens_BK, row_N[some], at_N[some], sampling)
        parts.append(p_RV.gather(1, tokens_BK[row_N[some], at_N[some], None])[:, 0])
    return torch.cat(parts).view(batch, num_draft)


def _own_tokens(
    logits_BKV: Tensor, proposal: Proposal, accepted_B: Tensor, sampling: Sampling, uniforms_B: Tensor
) -> Tensor:
    """The target's own token after the accepted ones, [B]: from the residual after a rejection, some rows at a time."""
    row_B = torch.arange(len(accepted_B), device=accepted_B.device)
    parts = []
    for some in chunks(len(row_B), logits_BKV):
        p_RV = _target(logits_BKV, proposal.tokens, row_B[some], accepted_B[some], sampling)
        p_RV = _residual(p_RV, _rejected(p_RV, proposal, row_B[some], accepted_B[some], sampling))
        parts.append(draw(p_RV, uniforms_B[some]))
    return torch.cat(parts)


def _target(logits_BKV: Tensor, tokens_BK: Tensor, row_R: Tensor, at_R: Tensor, sampling: Sampling) -> Tensor:
    """The target's distributions in rows [R] after the first at[r] draft tokens, [R, V] fp32."""
    before_RK = torch.arange(tokens_BK.shape[1], device=tokens_BK.device) < at_R[:, None]
    sampling_R = sampling.of(row_R).after(tokens_BK[row_R], before_RK)
    return distribution(penalised(logits_BKV[row_R, at_R], sampling_R), sampling)


def _rejected(p_RV: Tensor, proposal: Proposal, row_R: Tensor, at_R: Tensor, sampling: Sampling) -> Tensor:
    """The distributions that the draft token at[r] was drawn from, [R, V]; 0 where none was rejected there."""
    rejected_R1 = (at_R < proposal.lengths[row_R])[:, None]
    at_R = at_R.clamp(max=proposal.tokens.shape[1] - 1)
    if proposal.probabilities is None or sampling.temperature == 0:
        return torch.zeros_like(p_RV).scatter_(1, proposal.tokens[row_R, at_R, None], rejected_R1.to(p_RV.dtype))
    q_RV = proposal.probabilities[row_R, at_R].to(p_RV.dtype)
    # Not a product with 0: beyond a slot's length the numbers may be anything, NaN too.
    return torch.where(rejected_R1, q_RV / q_RV.sum(-1, keepdim=True), 0.0)


def _residual(p_RV: Tensor, q_RV: Tensor) -> Tensor:
    """max(p - q, 0), [R, V], not normalised; p where nothing is left.

    If p equals q up to rounding, nothing is left. The rejection is then due to rounding too, and p is right.
    """
    rest_RV = (p_RV - q_RV).clamp(min=0)
    return torch.where((rest_RV > 0).any(1, keepdim=True), rest_RV, p_RV)
