"""Who attends to whom: a block sees the context strictly before its anchor, and its own slots in both directions.

Knows this pattern only; projections, norms and caches are others'. One interface, three paths with the same numbers:

- `dense`: one masked softmax over [context ; all blocks of the sequence], by torch's fused kernel. The plainest, and
  the quickest on CPU; quadratic in blocks, and its mask takes batch * queries * keys.
- `split`: context and block apart, merged by their log-sum-exps. Context scores are formed in chunks, and again in
  backward, so memory does not grow with queries times tokens. Exact on any device.
- `flex`: the same split with the context part by flex_attention, whose block mask follows from the anchors directly.

Dummy entries of the grid (sequences with fewer blocks) have no context, and take part in context scores only.

Legend: B sequences, A most blocks in one sequence, K block size, N live blocks, Q = A * K queries, T context tokens,
h query heads, G kv heads, D head size.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

Path = Literal["split", "flex", "dense"]
KeysValues = tuple[Tensor, Tensor]

_CHUNK_ELEMENTS = 1 << 24  # context scores held at once: 64 MiB in fp32
_DENSE_MOST_MASK_ELEMENTS = 1 << 26  # the fused kernel makes the mask fp32: 256 MiB
_FLEX_BLOCK = 128
_FLEX_LEAST_HEAD_DIM = 16
_FLEX_LEAST_QUERIES = 256


class BlockLayout:
    """Where the blocks of a batch stand: tensors as anchors.AnchorPreparation.collate describes them."""

    def __init__(self, *, grid_BA: Tensor, grid_anchors_BA: Tensor, place_N: Tensor, block_size: int) -> None:
        self.grid_BA, self.grid_anchors_BA, self.place_N = grid_BA, grid_anchors_BA, place_N
        self.block_size = block_size
        # Every layer of a pass asks for the same mask.
        self._flex_masks: dict[int, BlockMask] = {}
        self._dense_masks: dict[int, Tensor] = {}

    @classmethod
    def one_each(cls, anchors_B: Tensor, block_size: int) -> BlockLayout:
        """One block a sequence, as in decoding."""
        place_B = torch.arange(len(anchors_B), device=anchors_B.device)
        return cls(grid_BA=place_B[:, None], grid_anchors_BA=anchors_B[:, None], place_N=place_B, block_size=block_size)

    @property
    def full(self) -> bool:
        """Whether every sequence has equally many blocks, so that grid and blocks are one order."""
        return self.place_N.numel() == self.grid_BA.numel()

    @cached_property
    def limits_BQ(self) -> Tensor:
        """How much context each query sees: its block's anchor."""
        return self.grid_anchors_BA.repeat_interleave(self.block_size, dim=1)

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
            self._flex_masks[num_tokens] = _flex_mask(self.limits_BQ, num_tokens)
        return self._flex_masks[num_tokens]

    def dense_mask(self, num_tokens: int) -> Tensor:
        """[B, 1, Q, T + Q] bool: the context before the anchor, then the block's own slots."""
        if num_tokens not in self._dense_masks:
            batch, num_queries = self.limits_BQ.shape
            before_BQT = torch.arange(num_tokens, device=self.limits_BQ.device) < self.limits_BQ[:, :, None]
            owner_Q = torch.arange(num_queries, device=self.limits_BQ.device) // self.block_size
            own_BQQ = (owner_Q[:, None] == owner_Q).expand(batch, -1, -1)
            self._dense_masks[num_tokens] = torch.cat([before_BQT, own_BQQ], dim=2)[:, None]
        return self._dense_masks[num_tokens]


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
    products are formed in its type, softmax in fp32. `path` None chooses by device and size.
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
            context_BhQD, context_lse_BhQ = _split(queries_BhQD, context, layout.limits_BQ, scale)
        own_NhKD, own_lse_NhK = _within_block(queries_NhKD, *block, scale)
        share_NhK1 = (layout.scatter(context_lse_BhQ) - own_lse_NhK).sigmoid().unsqueeze(-1)
        merged_NhKD = own_NhKD.float().lerp(layout.scatter(context_BhQD).float(), share_NhK1)
        return merged_NhKD.to(dtype)


def choose(queries_NhKD: Tensor, layout: BlockLayout, num_tokens: int) -> Path:
    """flex on CUDA where there is enough to do for its kernels; dense on CPU while its mask is small; else split."""
    batch, num_queries = layout.limits_BQ.shape
    if queries_NhKD.is_cuda and queries_NhKD.shape[-1] >= _FLEX_LEAST_HEAD_DIM and num_queries >= _FLEX_LEAST_QUERIES:
        return "flex"
    small = batch * num_queries * (num_tokens + num_queries) <= _DENSE_MOST_MASK_ELEMENTS
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


def _split(queries_BhQD: Tensor, context: KeysValues, limits_BQ: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    attended, lse = _ContextAttention.apply(queries_BhQD, *context, limits_BQ, scale)  # type: ignore[no-untyped-call]
    return attended, lse


class _ContextAttention(torch.autograd.Function):
    """Attention of queries [B, h, Q, D] to the first limits[b, q] of the keys [B, G, T, D], with its log-sum-exp.

    Returns [B, h, Q, D] and [B, h, Q] fp32, 0 and -inf where a limit is 0. Keeps no scores: p = exp(s - lse) is formed
    again in backward, ds = p * (dp - sum(do * o) + dlse).
    """

    @staticmethod
    def forward(
        ctx: Any, q_BhQD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, limits_BQ: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        out_BhQD = torch.empty_like(q_BhQD)
        lse_BhQ = torch.empty(q_BhQD.shape[:-1], dtype=torch.float32, device=q_BhQD.device)
        for at, tokens in _chunks(limits_BQ, q_BhQD.shape[1], k_BGTD.shape[2]):
            k, v = k_BGTD[:, :, :tokens], v_BGTD[:, :, :tokens]
            scores = _context_scores(q_BhQD[:, :, at], k, limits_BQ[:, at], scale)
            lse = scores.logsumexp(-1)
            probs = _probabilities(scores, lse)
            out_BhQD[:, :, at] = (probs.to(v.dtype) @ v).reshape(out_BhQD[:, :, at].shape)
            lse_BhQ[:, :, at] = lse.reshape(lse_BhQ[:, :, at].shape)
        ctx.save_for_backward(q_BhQD, k_BGTD, v_BGTD, limits_BQ, out_BhQD, lse_BhQ)
        ctx.scale = scale
        return out_BhQD, lse_BhQ

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BhQD, k_BGTD, v_BGTD, limits_BQ, out_BhQD, lse_BhQ = ctx.saved_tensors
        dout_BhQD, dlse_BhQ = grads
        groups = k_BGTD.shape[1]
        offset_BhQ = dlse_BhQ - (dout_BhQD.float() * out_BhQD.float()).sum(-1)
        dq_BhQD = torch.empty_like(q_BhQD)
        dk_BGTD, dv_BGTD = torch.zeros_like(k_BGTD, dtype=torch.float32), torch.zeros_like(v_BGTD, dtype=torch.float32)
        for at, tokens in _chunks(limits_BQ, q_BhQD.shape[1], k_BGTD.shape[2]):
            k, v = k_BGTD[:, :, :tokens], v_BGTD[:, :, :tokens]
            scores = _context_scores(q_BhQD[:, :, at], k, limits_BQ[:, at], ctx.scale)
            probs = _probabilities(scores, _grouped(lse_BhQ[:, :, at, None], groups)[..., 0])
            dout = _grouped(dout_BhQD[:, :, at], groups)
            dv_BGTD[:, :, :tokens] += probs.to(v.dtype).transpose(-1, -2) @ dout
            dscores = (dout @ v.transpose(-1, -2)).float() + _grouped(offset_BhQ[:, :, at, None], groups)
            dscores = (dscores * probs * ctx.scale).to(k.dtype)
            dq_BhQD[:, :, at] = (dscores @ k).reshape(dq_BhQD[:, :, at].shape)
            dk_BGTD[:, :, :tokens] += dscores.transpose(-1, -2) @ _grouped(q_BhQD[:, :, at], groups)
        return dq_BhQD, dk_BGTD.to(k_BGTD.dtype), dv_BGTD.to(v_BGTD.dtype), None, None


def _chunks(limits_BQ: Tensor, num_heads: int, num_tokens: int) -> list[tuple[slice, int]]:
    """Slices of the queries, and how many leading tokens any query of a slice sees."""
    batch, num_queries = limits_BQ.shape
    size = max(1, _CHUNK_ELEMENTS // max(1, batch * num_heads * num_tokens))
    slices = [slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]
    if limits_BQ.device.type != "cpu":  # reading the anchors would wait for the device
        return [(at, num_tokens) for at in slices]
    return [(at, int(limits_BQ[:, at].max())) for at in slices]


def _context_scores(q_BhCD: Tensor, k_BGTD: Tensor, limits_BC: Tensor, scale: float) -> Tensor:
    """[B, G, h/G * C, T] fp32, -inf from each query's limit on."""
    scores = (_grouped(q_BhCD, k_BGTD.shape[1]) @ k_BGTD.transpose(-1, -2)).float() * scale
    hidden_BCT = torch.arange(k_BGTD.shape[2], device=limits_BC.device) >= limits_BC[:, :, None]
    batch, groups, _, tokens = scores.shape
    scores.view(batch, groups, -1, limits_BC.shape[1], tokens).masked_fill_(hidden_BCT[:, None, None], -math.inf)
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in rows that see nothing; overwrites the scores."""
    return scores.sub_(lse.clamp(min=torch.finfo(torch.float32).min).unsqueeze(-1)).exp_()


def _dense(queries_NhKD: Tensor, context: KeysValues, block: KeysValues, layout: BlockLayout, scale: float) -> Tensor:
    keys = torch.cat([context[0], layout.gather(block[0])], dim=2)
    values = torch.cat([context[1], layout.gather(block[1])], dim=2)
    attended_BhQD = F.scaled_dot_product_attention(
        layout.gather(queries_NhKD),
        keys,
        values,
        attn_mask=layout.dense_mask(context[0].shape[2]),
        scale=scale,
        enable_gqa=True,
    )
    return layout.scatter(attended_BhQD)


def _flex(queries_BhQD: Tensor, context: KeysValues, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    kernel: Any = _compiled_flex() if queries_BhQD.is_cuda else flex_attention
    attended_BhQD, aux = kernel(
        queries_BhQD, *context, block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    return attended_BhQD, aux.lse


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _flex_mask(limits_BQ: Tensor, num_tokens: int) -> BlockMask:
    num_queries = limits_BQ.shape[1]
    padded_BX = F.pad(limits_BQ, (0, -num_queries % _FLEX_BLOCK))
    rows_BYX = padded_BX.view(len(padded_BX), -1, _FLEX_BLOCK)
    # Padding queries see nothing, which would make their block's full key blocks partial: leave them out of the least.
    real_YX = (torch.arange(padded_BX.shape[1], device=limits_BQ.device) < num_queries).view(-1, _FLEX_BLOCK)
    full_BY = rows_BYX.masked_fill(~real_YX, num_tokens).amin(-1) // _FLEX_BLOCK
    seen_BY = -(-rows_BYX.amax(-1) // _FLEX_BLOCK)
    num_key_blocks = -(-num_tokens // _FLEX_BLOCK)
    order_Z = torch.arange(num_key_blocks, device=limits_BQ.device)
    full_indices_BYZ = order_Z.expand(*full_BY.shape, -1)
    partial_indices_BYZ = (full_BY[..., None] + order_Z).clamp(max=num_key_blocks - 1)

    def before_anchor(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx < padded_BX[b, q_idx]

    def shaped(tensor: Tensor) -> Tensor:
        return tensor[:, None].to(torch.int32).contiguous()

    return BlockMask.from_kv_blocks(
        shaped(seen_BY - full_BY),
        shaped(partial_indices_BYZ),
        shaped(full_BY),
        shaped(full_indices_BYZ),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=before_anchor,
        seq_lengths=(num_queries, num_tokens),
    )
