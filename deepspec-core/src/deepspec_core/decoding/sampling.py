"""Turns logits into a distribution, and a distribution and a uniform number into a token.

Every row is computed by itself, so a sequence's tokens do not depend on other sequences. Callers give the uniform
numbers. Targets and drafts use the same functions. The order of the settings is that of transformers' `generate`: the
repetition penalty, the temperature, top-k, top-p, min-p. vLLM's is the same, but for min-p, which it applies before
top-k; that changes a distribution only where min-p and top-p are both on.

Legend: ... any leading dimensions, B sequences, K tokens of each, N rows, V vocabulary, M blocks of the vocabulary,
S tokens of a block, E candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Sampling

__all__ = ["distribution", "draw", "draw_in_turn", "draw_tokens", "next_token", "penalised"]

# For top-p, this many of the greatest probabilities are looked at before all of them are sorted.
_CANDIDATES = 256
# Cumulative sums are formed over blocks of this many tokens, and then within one block.
_BLOCK = 512
# A vocabulary of at most this many tokens is summed as one block, which takes less time than finding a block.
_WHOLE = 8 * _BLOCK
# Points are drawn below this part of the total, which an fp64 cumulative sum reaches whatever its order of addition.
_REACHED = 1 - 2.0**-46
# The largest number of entries of one fp32 tensor of logits or distributions. More rows are processed in turns.
_CHUNK = 2**24  # 64 MiB
_CHUNK_CPU = 2**21  # what caches hold


def distribution(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that tokens are drawn from: logits [..., V] to probabilities [..., V] in fp32, each row of sum
    1.

    Temperature is applied first. Then top-k keeps the k greatest logits, and those equal to the k-th. Then top-p keeps
    the fewest most probable tokens whose sum reaches p, equal ones in the order of ids. Then min-p keeps tokens by
    their ratio to the most probable one. Temperature 0 gives a one-hot at the argmax, the first of equals. The
    repetition penalty is `penalised`'s: it needs to know which rows are of which sequence.
    """
    if sampling.temperature == 0:
        one_hot_V = torch.zeros_like(logits_V, dtype=torch.float32)
        return one_hot_V.scatter_(-1, logits_V.argmax(dim=-1, keepdim=True), 1.0)
    logits_V = logits_V.float()
    if sampling.temperature != 1:
        logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < logits_V.shape[-1]:
        kth_1 = logits_V.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits_V = logits_V.masked_fill(logits_V < kth_1, -torch.inf)
    probs_V = logits_V.softmax(dim=-1)
    if sampling.top_p == 1 and sampling.min_p == 0:
        return probs_V
    if sampling.top_p < 1:
        kept_NV = _most_probable(probs_V.reshape(-1, probs_V.shape[-1]), sampling.top_p)
        probs_V = probs_V.where(kept_NV.view(probs_V.shape), 0.0)
    if sampling.min_p > 0:
        floor_1 = sampling.min_p * probs_V.amax(dim=-1, keepdim=True)
        probs_V = probs_V.masked_fill(probs_V < floor_1, 0.0)
    return probs_V / probs_V.sum(dim=-1, keepdim=True)


def penalised(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] or [B, K, V] with the repetition penalty on the tokens of `sampling.seen`, the same for all K.

    As they came where there is no penalty.
    """
    if sampling.seen is None or sampling.repetition_penalty == 1:
        return logits_BV
    logits_BV = logits_BV.float()
    seen_BV = sampling.seen if logits_BV.dim() == 2 else sampling.seen[:, None]
    penalty = sampling.repetition_penalty
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def next_token(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> tuple[Tensor, Tensor | None]:
    """A draft's token for each sequence, [B], and the distribution it was drawn from, [B, V]: None at temperature 0.

    Of logits in bf16 or fp16 the distribution is rounded to bf16 before the draw, so that all distributions of a
    proposal take no more room than its logits. It is fp32 otherwise.
    """
    penalised_BV = penalised(logits_BV, sampling)
    if sampling.temperature == 0:
        return penalised_BV.argmax(-1), None
    return _drawn(penalised_BV, sampling, uniforms_B, _kept_as(logits_BV))


def _drawn(logits_V: Tensor, sampling: Sampling, uniforms: Tensor, kept_as: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens [...] and the distributions [..., V] they are drawn from, in this type."""
    probs_V = distribution(logits_V, sampling).to(kept_as)
    return draw(probs_V, uniforms), probs_V


def draw_tokens(logits_BKV: Tensor, sampling: Sampling, uniforms_BK: Tensor) -> tuple[Tensor, Tensor | None]:
    """K tokens for each sequence, [B, K], and their distributions, [B, K, V]: None at temperature 0.

    The logits [B, K, V] do not depend on the tokens, as those of heads that propose side by side. With a repetition
    penalty the distributions do, so they are then drawn from left to right. Distributions are as `next_token` gives
    them.
    """
    uniforms_BK = uniforms_BK[:, : logits_BKV.shape[1]]
    if sampling.seen is None:
        if sampling.temperature == 0 or logits_BKV.numel() <= _most(logits_BKV):
            return next_token(logits_BKV, sampling, uniforms_BK)
        logits_NV, uniforms_N = logits_BKV.flatten(0, 1), uniforms_BK.flatten()
        tokens_N = torch.empty_like(uniforms_N, dtype=torch.long)
        probs_NV = torch.empty_like(logits_NV, dtype=_kept_as(logits_NV))
        for some in chunks(len(logits_NV), logits_NV):
            tokens_N[some], probs_NV[some] = _drawn(logits_NV[some], sampling, uniforms_N[some], probs_NV.dtype)
        return tokens_N.view_as(uniforms_BK), probs_NV.view_as(logits_BKV)
    unread_B = torch.zeros_like(uniforms_BK[:, 0], dtype=torch.long)
    return draw_in_turn(lambda k, previous_B: logits_BKV[:, k], unread_B, sampling, uniforms_BK)


def draw_in_turn(
    logits: Callable[[int, Tensor], Tensor], last_B: Tensor, sampling: Sampling, uniforms_BK: Tensor
) -> tuple[Tensor, Tensor | None]:
    """K tokens for each sequence and their distributions, as `draw_tokens` gives them, each given the token before it.

    logits(k, previous_B) gives [B, V]. The token before the first is `last_B`, and uniforms_BK has K columns.
    """
    tokens, probs = [], []
    for k, uniforms_B in enumerate(uniforms_BK.unbind(1)):
        last_B, probs_BV = next_token(logits(k, last_B), sampling, uniforms_B)
        sampling = sampling.after(last_B)
        tokens.append(last_B)
        probs += [] if probs_BV is None else [probs_BV]
    return torch.stack(tokens, dim=1), torch.stack(probs, dim=1) if probs else None


def _most(logits_V: Tensor) -> int:
    """The most entries of a tensor of distributions, where these logits are."""
    return _CHUNK_CPU if logits_V.device.type == "cpu" else _CHUNK


def _kept_as(logits_V: Tensor) -> torch.dtype:
    """The type of the distributions that stand beside these logits until they are verified."""
    return torch.bfloat16 if logits_V.itemsize == 2 else torch.float32


def chunks(rows: int, logits_V: Tensor) -> Iterator[slice]:
    """Slices that cover so many rows of these logits [..., V]. What is formed of one slice's rows is small enough."""
    step = max(1, _most(logits_V) // logits_V.shape[-1])
    for start in range(0, max(rows, 1), step):  # of no rows one empty slice, so that parts can be joined
        yield slice(start, min(start + step, rows))


def pick(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """The target's own token for each sequence, [B], from fp32 distributions. One chunk's of them exist at a time."""
    if sampling.temperature == 0 and sampling.seen is None:
        return logits_BV.argmax(-1)
    parts = []
    for some in chunks(len(logits_BV), logits_BV):
        some_BV = penalised(logits_BV[some], sampling.of(some))
        parts.append(
            some_BV.argmax(-1) if sampling.temperature == 0 else draw(distribution(some_BV, sampling), uniforms_B[some])
        )
    return torch.cat(parts)


def draw(probs_V: Tensor, uniforms: Tensor) -> Tensor:
    """Draw tokens by inverse CDF: each is the first whose cumulative probability exceeds u times the total.

    Takes probs [..., V] and uniforms [...] in [0, 1), and gives ids [...] int64. A row's sum must be above 0 and need
    not be 1. A token of probability 0 is never drawn, however close u is to 1.
    """
    if probs_V.shape[-1] <= _WHOLE:
        summed_V = probs_V.cumsum(dim=-1, dtype=torch.float64)
        return _first_beyond(probs_V, summed_V, uniforms.double() * summed_V[..., -1])
    block, into = _reached(block_sums(probs_V), uniforms)
    inside_S = _of_block(probs_V, block)
    return block * _BLOCK + _first_beyond(inside_S, inside_S.cumsum(dim=-1, dtype=torch.float64), into)


def mass_before(probs_V: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the probabilities of all ids below the given ones [...], and of all ids; both in fp64."""
    probs_NV = probs_V.reshape(-1, probs_V.shape[-1])
    sums_NM = torch.cat([block_sums(probs_NV[some]) for some in chunks(len(probs_NV), probs_NV)])
    sums_M = sums_NM.double().view(*probs_V.shape[:-1], sums_NM.shape[1])
    blocks_M = torch.arange(sums_M.shape[-1], device=ids.device)
    before_M = sums_M.where(blocks_M < (ids // _BLOCK)[..., None], 0.0)
    inside_S = _of_block(probs_V, ids // _BLOCK).double()
    below_S = torch.arange(_BLOCK, device=ids.device) < (ids % _BLOCK)[..., None]
    return before_M.sum(-1) + inside_S.where(below_S, 0.0).sum(-1), sums_M.sum(-1)


def totals(probs_V: Tensor) -> Tensor:
    """The sum of each distribution, [...], in fp32; of fp64 in fp64."""
    probs_NV = probs_V.reshape(-1, probs_V.shape[-1])
    # On the CPU a sum of bf16 numbers first copies all of them to fp32.
    parts = [_wide(probs_NV[some]).sum(-1) for some in chunks(len(probs_NV), probs_NV)]
    return torch.cat(parts).view(probs_V.shape[:-1])


def _wide(probs_V: Tensor) -> Tensor:
    """The numbers in fp32; fp64 ones as they are."""
    return probs_V.to(torch.promote_types(probs_V.dtype, torch.float32))


def block_sums(probs_V: Tensor) -> Tensor:
    """The sum of each block of the vocabulary, [..., M], in fp32; of fp64 in fp64."""
    probs_V = _wide(probs_V)
    whole = probs_V.shape[-1] // _BLOCK * _BLOCK
    sums_M = probs_V[..., :whole].reshape(*probs_V.shape[:-1], whole // _BLOCK, _BLOCK).sum(-1)
    return torch.cat([sums_M, probs_V[..., whole:].sum(-1, keepdim=True)], dim=-1)


def _of_block(probs_V: Tensor, block: Tensor) -> Tensor:
    """The probabilities in one block of each row, [..., S]; 0 beyond the vocabulary."""
    ids_S = (block * _BLOCK)[..., None] + torch.arange(_BLOCK, device=block.device)
    last = probs_V.shape[-1] - 1
    return probs_V.gather(-1, ids_S.clamp(max=last)).masked_fill(ids_S > last, 0.0)


def _reached(mass: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry [...] whose cumulative mass exceeds u times the total, and how far into it that point lies."""
    summed = mass.cumsum(dim=-1, dtype=torch.float64)
    point = uniforms.double() * summed[..., -1]
    first = _first_beyond(mass, summed, point)
    return first, point - (summed.gather(-1, first[..., None]) - mass.gather(-1, first[..., None]))[..., 0]


def _first_beyond(mass: Tensor, summed: Tensor, point: Tensor) -> Tensor:
    """The first entry that has mass and whose cumulative mass exceeds the point; the last that has mass, if none."""
    point = torch.minimum(point, summed[..., -1] * _REACHED)[..., None]
    # A parallel cumulative sum may not be monotone to the last bit, so every entry is compared, without binary search.
    return ((mass > 0) & (summed > point)).view(torch.uint8).argmax(dim=-1)


def _most_probable(probs_NV: Tensor, p: float) -> Tensor:
    """A mask [N, V] of the fewest most probable tokens whose sum reaches p. Of equal ones, the first are taken."""
    vocab_size = probs_NV.shape[1]
    most = min(_CANDIDATES, vocab_size)
    count_N, least_N, at_least_N = _border(probs_NV.topk(most, dim=1).values, p)
    if most < vocab_size and len(flat := (count_N == most).nonzero()[:, 0]):
        # A row this flat needs, or may need, more tokens than the candidates.
        found = _border(probs_NV[flat].sort(dim=1, descending=True).values, p)
        count_N[flat], least_N[flat], at_least_N[flat] = found
    kept_NV = probs_NV >= least_N[:, None]
    if len(tied := (at_least_N > count_N).nonzero()[:, 0]):
        equal_RV = probs_NV[tied] == least_N[tied, None]
        above_R1 = kept_NV[tied].sum(1, keepdim=True) - equal_RV.sum(1, keepdim=True)
        beyond_RV = equal_RV & (equal_RV.cumsum(1, dtype=torch.int32) > count_N[tied, None] - above_R1)
        kept_NV[tied] &= ~beyond_RV
    return kept_NV


def _border(sorted_NE: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """How many of the probabilities, in descending order, it takes to reach p, the least of these, and how many of all
    given ones are not below it.
    """
    mass_before_NE = sorted_NE.cumsum(dim=1, dtype=torch.float64) - sorted_NE
    count_N = (mass_before_NE < p).sum(1)
    least_N = sorted_NE.gather(1, count_N[:, None] - 1)[:, 0]
    return count_N, least_N, (sorted_NE >= least_N[:, None]).sum(1)
