"""Who attends to whom: a block sees the context strictly before its anchor, and its own slots in both directions.

With a window W, the slot at position p sees no context before p - W + 1. A block is no longer than a window.

Knows this pattern only; projections, norms and caches are others'. One interface, three paths with the same numbers:

- `dense`: a masked softmax over [context ; blocks] for a few blocks at a time, by torch's fused kernel. Anchors rise,
  so the keys are the context before the last anchor of these blocks, and their own slots. The quickest on CPU. Each few
  blocks keep a copy of the keys and values that they see.
- `split`: context and block apart, merged by their log-sum-exps. Context scores are formed in chunks, and again in
  backward, so memory does not grow with queries times tokens. Exact on any device.
- `flex`: the same split with the context part by flex_attention, whose block mask follows from the anchors directly.

Dummy entries of the grid (rows with fewer blocks) have no context, and take part in context scores only. In a packed
row a block sees nothing before the column in which its conversation begins.

Legend: B sequences or packed rows, A most blocks in one of them, K block size, N live blocks, Q = A * K queries,
T context tokens, h query heads, G kv heads, D head size.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from deepspec_core.layers.interval_mask import FLEX_BLOCK, interval_mask
from deepspec_core.layers.score_chunks import few_lengths, queries_a_chunk

Path = Literal["split", "flex", "dense"]
KeysValues = tuple[Tensor, Tensor]

_CHUNK_ELEMENTS = 1 << 24  # context scores held at once: 64 MiB in fp32
_CHUNK_ELEMENTS_CPU = 1 << 21  # what caches hold
_DENSE_QUERIES = 128  # of one call: more see more keys in vain, fewer are slower products
_DENSE_MOST_KEYS = 1 << 18  # copied a layer
_FLEX_LEAST_HEAD_DIM = 16
_FLEX_LEAST_QUERIES = 256


class BlockLayout:
    """Where the blocks of a batch stand: tensors as grid.GridPreparation.collate describes them.

    `window`: how many positions a slot sees, its own included; None: the whole context.
    `grid_begins_BA`: where each block's context begins; None: at column 0.
    """

    def __init__(
        self,
        *,
        grid_BA: Tensor,
        grid_anchors_BA: Tensor,
        place_N: Tensor,
        block_size: int,
        window: int | None = None,
        grid_begins_BA: Tensor | None = None,
    ) -> None:
        assert window is None or window >= block_size
        self.grid_BA, self.grid_anchors_BA, self.place_N = grid_BA, grid_anchors_BA, place_N
        self.grid_begins_BA = grid_begins_BA
        self.block_size, self.window = block_size, window
        # Every layer of a pass asks for the same mask.
        self._flex_masks: dict[int, BlockMask] = {}
        self._dense_parts: list[DensePart] = []

    @classmethod
    def one_each(cls, anchors_B: Tensor, block_size: int, window: int | None = None) -> BlockLayout:
        """One block a sequence, as in decoding."""
        place_B = torch.arange(len(anchors_B), device=anchors_B.device)
        return cls(
            grid_BA=place_B[:, None],
            grid_anchors_BA=anchors_B[:, None],
            place_N=place_B,
            block_size=block_size,
            window=window,
        )

    @property
    def full(self) -> bool:
        """Whether every sequence has equally many blocks, so that grid and blocks are one order."""
        return self.place_N.numel() == self.grid_BA.numel()

    @cached_property
    def limits_BQ(self) -> Tensor:
        """Where the context that each query sees ends: at its block's anchor."""
        return self.grid_anchors_BA.repeat_interleave(self.block_size, dim=1)

    @cached_property
    def first_BQ(self) -> Tensor | None:
        """Where it begins; None where it does at column 0, for every query."""
        begins_BA = self.grid_begins_BA
        if self.window is None:
            return None if begins_BA is None else begins_BA.repeat_interleave(self.block_size, dim=1)
        slots_K = torch.arange(self.block_size, device=self.grid_anchors_BA.device)
        reached_BAK = self.grid_anchors_BA[..., None] + slots_K - self.window + 1
        least_BAK = torch.zeros_like(reached_BAK) if begins_BA is None else begins_BA[..., None]
        return torch.maximum(reached_BAK, least_BAK).flatten(1)

    def gather(self, blocks_NhKD: Tensor) -> Tensor:
        """[N, h, K, D] -> [B, h, Q, D], grouped by sequence."""
        if not self.full:
            blocks_NhKD = blocks_NhKD.index_select(0, self.grid_BA.flatten())
        return blocks_NhKD.reshape(*self.grid_BA.shape, *blocks_NhKD.shape[1:]).transpose(1, 2).flatten(2, 3)

    def scatter(self, queries_BhQ: Tensor) -> Tensor:
        """[B, h, Q, ...] -> [N, h, K, ...], live blocks only."""
        batch, heads = queries_BhQ.shape[:2]
        grid_BhAK = queries_BhQ.reshape(batch, heads, -1, self.block_size, *queries_BhQ.shape[3:])
        blocks_NhK = grid_BhAK.transpose(1, 2).flatten(0, 1)
        return blocks_NhK if self.full else blocks_NhK.index_select(0, self.place_N)

    def flex_mask(self, num_tokens: int) -> BlockMask:
        """Key blocks each query block sees wholly or in part; from the anchors, without evaluating the mask densely."""
        if num_tokens not in self._flex_masks:
            first_BQ, limits_BQ = self.first_BQ, self.limits_BQ
            # Queries that fill up the last block see nothing.
            limits_BX = F.pad(limits_BQ, (0, FLEX_BLOCK))
            first_BX = None if first_BQ is None else F.pad(first_BQ, (0, FLEX_BLOCK))

            def in_sight(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                before_anchor = kv_idx < limits_BX[b, q_idx]
                return before_anchor if first_BX is None else before_anchor & (kv_idx >= first_BX[b, q_idx])

            self._flex_masks[num_tokens] = interval_mask(first_BQ, limits_BQ, num_tokens, in_sight)
        return self._flex_masks[num_tokens]

    def dense_parts(self, num_tokens: int) -> list[DensePart]:
        """The queries in their order, a few blocks at a time; each part at least one block."""
        if not self._dense_parts:
            size = max(1, _DENSE_QUERIES // self.block_size) * self.block_size
            owner_Q = torch.arange(size, device=self.limits_BQ.device) // self.block_size
            own_XX = owner_Q[:, None] == owner_Q
            for at, seen in _slices(self, size, num_tokens):
                queries = at.stop - at.start
                first_BX = None if self.first_BQ is None else self.first_BQ[:, at]
                seen_BXT = ~_hidden(first_BX, self.limits_BQ[:, at], seen)
                own_BXX = own_XX[:queries, :queries].expand(len(seen_BXT), -1, -1)
                self._dense_parts.append(DensePart(at, seen, torch.cat([seen_BXT, own_BXX], dim=2)[:, None]))
        return self._dense_parts


class DensePart(NamedTuple):
    """Queries `at`, the context tokens `seen` by any of them, and their mask over [these ; own slots], [B, 1, X, Y]."""

    at: slice
    seen: slice
    mask_B1XY: Tensor


def attend(
    queries_NhKD: Tensor,
    context: KeysValues,
    block: KeysValues,
    layout: BlockLayout,
    *,
    scale: float,
    path: Path | None = None,
) -> Tensor:
    """softmax(scale * q [Kc ; Kb]^T + mask) [Vc ; Vb], [N, h, K, D].

    context: keys and values [B, G, T, D] of each sequence position; block: [N, G, K, D] of each slot. Under autocast
    products are formed in its type (in fp32 on CPUs without AMX), softmax in fp32. `path` None chooses by device and
    size.
    """
    device = queries_NhKD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else context[1].dtype
    queries_NhKD = queries_NhKD.to(dtype)
    context, block = (context[0].to(dtype), context[1].to(dtype)), (block[0].to(dtype), block[1].to(dtype))
    path = path or choose(queries_NhKD, layout, context[0].shape[2])
    with torch.autocast(device, enabled=False):
        if path == "dense":
            return _dense(queries_NhKD, context, block, layout, scale)
        queries_BhQD = layout.gather(queries_NhKD)
        if path == "flex":
            context_BhQD, context_lse_BhQ = _flex(queries_BhQD, context, layout.flex_mask(context[0].shape[2]), scale)
        else:
            context_BhQD, context_lse_BhQ = _split(queries_BhQD, context, layout, scale)
        own_NhKD, own_lse_NhK = _within_block(queries_NhKD, *block, scale)
        share_NhK1 = (layout.scatter(context_lse_BhQ) - own_lse_NhK).sigmoid().unsqueeze(-1)
        merged_NhKD = own_NhKD.float().lerp(layout.scatter(context_BhQD).float(), share_NhK1)
        return merged_NhKD.to(dtype)


def choose(queries_NhKD: Tensor, layout: BlockLayout, num_tokens: int) -> Path:
    """flex on CUDA where there is enough to do for its kernels; dense on CPU while its copies are small; else split."""
    batch, num_queries = layout.limits_BQ.shape
    if queries_NhKD.is_cuda and queries_NhKD.shape[-1] >= _FLEX_LEAST_HEAD_DIM and num_queries >= _FLEX_LEAST_QUERIES:
        return "flex"
    small = batch * -(-num_queries // _DENSE_QUERIES) * num_tokens <= _DENSE_MOST_KEYS
    return "dense" if queries_NhKD.device.type == "cpu" and small else "split"


def _grouped(queries_BhQD: Tensor, num_kv_heads: int) -> Tensor:
    """[B, h, Q, D] -> [B, G, h/G * Q, D]: the query heads that share a kv head, one after another."""
    batch, heads, queries, head_dim = queries_BhQD.shape
    return queries_BhQD.reshape(batch, num_kv_heads, heads // num_kv_heads * queries, head_dim)


def _within_block(queries_NhKD: Tensor, keys_NGKD: Tensor, values_NGKD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention inside each block and its log-sum-exp, [N, h, K, D] and [N, h, K] fp32."""
    shape = queries_NhKD.shape
    grouped_NGXD = _grouped(queries_NhKD, keys_NGKD.shape[1])
    scores_NGXK = (grouped_NGXD @ keys_NGKD.transpose(-1, -2)).float() * scale
    attended_NGXD = scores_NGXK.softmax(-1).to(values_NGKD.dtype) @ values_NGKD
    return attended_NGXD.reshape(shape), scores_NGXK.logsumexp(-1).reshape(shape[:-1])


def _split(queries_BhQD: Tensor, context: KeysValues, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    attended, lse = _ContextAttention.apply(queries_BhQD, *context, layout, scale)  # type: ignore[no-untyped-call]
    return attended, lse


class _ContextAttention(torch.autograd.Function):
    """Attention of queries [B, h, Q, D] to the keys [B, G, T, D] from first[b, q] to limits[b, q].

    Returns it and its log-sum-exp, [B, h, Q, D] and [B, h, Q] fp32, 0 and -inf where a query sees nothing. Keeps no
    scores: p = exp(s - lse) is formed again in backward, ds = p * (dp - sum(do * o) + dlse).
    """

    @staticmethod
    def forward(
        ctx: Any, q_BhQD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, layout: BlockLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        out_BhQD = torch.empty_like(q_BhQD)
        lse_BhQ = torch.empty(q_BhQD.shape[:-1], dtype=torch.float32, device=q_BhQD.device)
        for at, seen in _chunks(layout, q_BhQD.shape[1], k_BGTD.shape[2]):
            v = v_BGTD[:, :, seen]
            scores = _context_scores(q_BhQD, k_BGTD, at, seen, layout, scale)
            lse = scores.logsumexp(-1)
            probs = _probabilities(scores, lse)
            out_BhQD[:, :, at] = (probs.to(v.dtype) @ v).reshape(out_BhQD[:, :, at].shape)
            lse_BhQ[:, :, at] = lse.reshape(lse_BhQ[:, :, at].shape)
        ctx.save_for_backward(q_BhQD, k_BGTD, v_BGTD, out_BhQD, lse_BhQ)
        ctx.layout, ctx.scale = layout, scale
        return out_BhQD, lse_BhQ

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BhQD, k_BGTD, v_BGTD, out_BhQD, lse_BhQ = ctx.saved_tensors
        dout_BhQD, dlse_BhQ = grads
        groups = k_BGTD.shape[1]
        offset_BhQ = dlse_BhQ - (dout_BhQD.float() * out_BhQD.float()).sum(-1)
        dq_BhQD = torch.empty_like(q_BhQD)
        dk_BGTD, dv_BGTD = torch.zeros_like(k_BGTD, dtype=torch.float32), torch.zeros_like(v_BGTD, dtype=torch.float32)
        for at, seen in _chunks(ctx.layout, q_BhQD.shape[1], k_BGTD.shape[2]):
            k, v = k_BGTD[:, :, seen], v_BGTD[:, :, seen]
            scores = _context_scores(q_BhQD, k_BGTD, at, seen, ctx.layout, ctx.scale)
            probs = _probabilities(scores, _grouped(lse_BhQ[:, :, at, None], groups)[..., 0])
            dout = _grouped(dout_BhQD[:, :, at], groups)
            dv_BGTD[:, :, seen] += probs.to(v.dtype).transpose(-1, -2) @ dout
            dscores = (dout @ v.transpose(-1, -2)).float() + _grouped(offset_BhQ[:, :, at, None], groups)
            dscores = (dscores * probs * ctx.scale).to(k.dtype)
            dq_BhQD[:, :, at] = (dscores @ k).reshape(dq_BhQD[:, :, at].shape)
            dk_BGTD[:, :, seen] += dscores.transpose(-1, -2) @ _grouped(q_BhQD[:, :, at], groups)
        return dq_BhQD, dk_BGTD.to(k_BGTD.dtype), dv_BGTD.to(v_BGTD.dtype), None, None


def _chunks(layout: BlockLayout, num_heads: int, num_tokens: int) -> list[tuple[slice, slice]]:
    """Slices of the queries, and a slice of the tokens with all that any query of theirs sees."""
    most = _CHUNK_ELEMENTS_CPU if layout.limits_BQ.device.type == "cpu" else _CHUNK_ELEMENTS
    size = queries_a_chunk(most, len(layout.limits_BQ) * num_heads * num_tokens)
    return [(at, few_lengths(seen, num_tokens)) for at, seen in _slices(layout, size, num_tokens)]


def _slices(layout: BlockLayout, size: int, num_tokens: int) -> list[tuple[slice, slice]]:
    """The same for slices of `size` queries."""
    limits_BQ, first_BQ = layout.limits_BQ, layout.first_BQ
    num_queries = limits_BQ.shape[1]
    slices = [slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]
    if limits_BQ.device.type != "cpu":  # reading the anchors would wait for the device
        return [(at, slice(0, num_tokens)) for at in slices]
    begins = [0 if first_BQ is None else int(first_BQ[:, at].min()) for at in slices]
    return [(at, slice(begin, int(limits_BQ[:, at].max()))) for at, begin in zip(slices, begins, strict=True)]


def _hidden(first_BC: Tensor | None, limits_BC: Tensor, tokens: slice) -> Tensor:
    """[B, C, tokens] bool: the context that each query does not see."""
    positions_T = torch.arange(tokens.start, tokens.stop, device=limits_BC.device)
    hidden_BCT = positions_T >= limits_BC[:, :, None]
    return hidden_BCT if first_BC is None else hidden_BCT | (positions_T < first_BC[:, :, None])


def _context_scores(
    q_BhQD: Tensor, k_BGTD: Tensor, at: slice, seen: slice, layout: BlockLayout, scale: float
) -> Tensor:
    """Scores of the queries `at` over the tokens `seen`, [B, G, h/G * C, tokens] fp32, -inf where hidden."""
    scores = (_grouped(q_BhQD[:, :, at], k_BGTD.shape[1]) @ k_BGTD[:, :, seen].transpose(-1, -2)).float() * scale
    first_BC = None if layout.first_BQ is None else layout.first_BQ[:, at]
    hidden_BCT = _hidden(first_BC, layout.limits_BQ[:, at], seen)
    batch, groups, queries, tokens = scores.shape
    chunk = hidden_BCT.shape[1]
    # Where no query of the chunk sees any context there are no scores, and a size cannot be left open.
    scores.view(batch, groups, queries // chunk, chunk, tokens).masked_fill_(hidden_BCT[:, None, None], -math.inf)
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in rows that see nothing; overwrites the scores."""
    return scores.sub_(lse.clamp(min=torch.finfo(torch.float32).min).unsqueeze(-1)).exp_()


def _dense(queries_NhKD: Tensor, context: KeysValues, block: KeysValues, layout: BlockLayout, scale: float) -> Tensor:
    dtype = queries_NhKD.dtype
    if dtype == torch.bfloat16 and queries_NhKD.device.type == "cpu" and not _fast_bfloat16():
        queries_NhKD = queries_NhKD.float()
        context, block = (context[0].float(), context[1].float()), (block[0].float(), block[1].float())
    queries_BhQD = layout.gather(queries_NhKD)
    own_keys_BGQD, own_values_BGQD = layout.gather(block[0]), layout.gather(block[1])
    parts = [
        F.scaled_dot_product_attention(
            queries_BhQD[:, :, at],
            torch.cat([context[0][:, :, seen], own_keys_BGQD[:, :, at]], dim=2),
            torch.cat([context[1][:, :, seen], own_values_BGQD[:, :, at]], dim=2),
            attn_mask=mask_B1XY,
            scale=scale,
            enable_gqa=True,
        )
        for at, seen, mask_B1XY in layout.dense_parts(context[0].shape[2])
    ]
    return layout.scatter(torch.cat(parts, dim=2)).to(dtype)


@cache
def _fast_bfloat16() -> bool:
    """Whether the fused kernel multiplies bf16 faster than fp32 on this CPU: only with AMX.

    Without it, its backward pass took three times as long in bf16 as in fp32.
    """
    return bool(torch.cpu._is_amx_tile_supported())


def _flex(queries_BhQD: Tensor, context: KeysValues, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    kernel: Any = _compiled_flex() if queries_BhQD.is_cuda else flex_attention
    attended_BhQD, aux = kernel(
        queries_BhQD, *context, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    return attended_BhQD, aux.lse


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)
