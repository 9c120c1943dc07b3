"""Who attends to whom in test-time training: step-0 keys at and before the query, and its own keys of later steps.

Index q at step s attends to the step-0 keys of indices first..q, `first` being where its document begins, and to the
keys of steps 1..s at index q alone. The two parts are merged by log-sum-exp, so no [T, S * T] scores exist, whatever
the number of steps. Its position is q + s: with a window W it sees no step-0 key before q + s - W + 1. W is larger than
any s, so its own keys are in sight. Knows this pattern only; projections and norms are others'.

Step 0 runs over whole sequences, [B, T]. Later steps run over a list of places of the flattened batch, those something
is predicted from: only the first part knows about sequences, and it sees their queries by sequence. It has two paths
with the same numbers:

- `chunked`: scores of some queries at a time, formed again in backward. Exact on any device. On a CPU later steps form
  scores of the listed places only.
- `flex`: flex_attention's kernels, on CUDA where there is enough to do for them. Queries are put back in place.

Legend: B sequences, T tokens, N places, Q queries of a sequence, X queries of a chunk, h query heads, G kv heads,
D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from deepspec_core.layers.interval_mask import interval_mask
from deepspec_core.layers.score_chunks import few_lengths, queries_a_chunk

Path = Literal["chunked", "flex"]
KeysValues = tuple[Tensor, Tensor]

_CHUNK_ELEMENTS = 1 << 26  # first-part scores held at once: 256 MiB in fp32
_CHUNK_ELEMENTS_CPU = 1 << 20  # what caches hold
_FLEX_LEAST_HEAD_DIM = 16
_FLEX_LEAST_TOKENS = 256


class StepLayout:
    """Where each index's document begins, [B, T] (None where every row is one document), and how far a step sees.

    `reach`: how many step-0 keys an index sees at most, the one at the index included; None: all of its document.
    """

    def __init__(self, first_BT: Tensor | None = None, window: int | None = None) -> None:
        self.first_BT, self.reach = first_BT, window
        self._flex_masks: dict[int, BlockMask] = {}
        self._steps: dict[int, StepLayout] = {}
        self._grid: PlaceGrid | None = None

    def at(self, step: int) -> StepLayout:
        """The layout of a later step, whose queries stand `step` positions further on than their index."""
        if self.reach is None or step == 0:
            return self
        assert self.reach > step
        # Every layer of a step asks for the same mask.
        return self._steps.setdefault(step, StepLayout(self.first_BT, self.reach - step))

    def queries(self, num_tokens: int, device: torch.device) -> Queries:
        """Those of whole sequences."""
        return Queries(torch.arange(num_tokens, device=device)[None], self.first_BT, self.reach, whole=True)

    def queries_at(self, grid: PlaceGrid) -> Queries:
        """Those of listed places."""
        first_BQ = None if self.first_BT is None else self.first_BT.gather(1, grid.index_BQ)
        return Queries(grid.index_BQ, first_BQ, self.reach, whole=False)

    def grid(self, places_N: Tensor, batch: int, num_tokens: int) -> PlaceGrid:
        """The places by sequence; every step and layer asks for the same ones. Made on the host."""
        if self._grid is None:
            self._grid = PlaceGrid.of(places_N, batch, num_tokens)
        return self._grid

    def flex_mask(self, num_tokens: int, device: torch.device) -> BlockMask:
        """The first part's mask; every step and layer asks for the same one."""
        if num_tokens not in self._flex_masks:
            first_BT, reach = self.first_BT, self.reach

            def in_sight(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                seen = q_idx >= kv_idx
                if first_BT is not None:
                    seen = seen & (kv_idx >= first_BT[b, q_idx])
                return seen if reach is None else seen & (kv_idx > q_idx - reach)

            index_1T = torch.arange(num_tokens, device=device)[None]
            begins_BT = first_BT
            if reach is not None:
                reached_1T = (index_1T - reach + 1).clamp(min=0)
                begins_BT = reached_1T if first_BT is None else torch.maximum(reached_1T, first_BT)
            limits_BT = index_1T + 1
            if begins_BT is not None:
                limits_BT = limits_BT.expand_as(begins_BT)
            self._flex_masks[num_tokens] = interval_mask(begins_BT, limits_BT, num_tokens, in_sight)
        return self._flex_masks[num_tokens]


class PlaceGrid(NamedTuple):
    """Places of a batch, by sequence, so that all sequences have equally many.

    index_BQ: Where each stands in its sequence. Entries that fill up a shorter list repeat a place of some sequence.
    cell_N: The entry of the flattened grid that holds each place.
    """

    index_BQ: Tensor
    cell_N: Tensor

    @classmethod
    def of(cls, places_N: Tensor, batch: int, num_tokens: int) -> PlaceGrid:
        """Of places in a batch of sequences of so many tokens. They rise, and there is at least one."""
        row_N = places_N // num_tokens
        counts_B = torch.bincount(row_N, minlength=batch)
        end_B = counts_B.cumsum(0)
        start_B, most = end_B - counts_B, int(counts_B.max())
        cell_N = row_N * most + torch.arange(len(places_N)) - start_B[row_N]
        listed_BQ = torch.minimum(start_B[:, None] + torch.arange(most), (end_B - 1).clamp(min=0)[:, None])
        return cls((places_N % num_tokens)[listed_BQ], cell_N)


class Queries(NamedTuple):
    """Which index each query stands at, where its document begins ([B, Q], or [1, Q] for all sequences), and its reach.

    `whole`: the queries are all indices in their order.
    """

    index_BQ: Tensor
    first_BQ: Tensor | None
    reach: int | None
    whole: bool

    def seen(self, at: slice, num_tokens: int) -> slice:
        """The step-0 keys that any query of the slice sees, and more where telling would wait for a device."""
        first, last = at.start, at.stop - 1
        if not self.whole:
            index_BX = self.index_BQ[:, at]
            first, last = int(index_BX.min()), int(index_BX.max())
        begin = 0 if self.reach is None else max(0, first + 1 - self.reach)
        if self.first_BQ is not None and self.first_BQ.device.type == "cpu":
            begin = max(begin, int(self.first_BQ[:, at].min()))
        return few_lengths(slice(begin, last + 1), num_tokens)

    def hidden(self, at: slice, seen: slice) -> Tensor:
        """[B or 1, X, keys] bool: what is after the query, before its document, or beyond its reach."""
        index_BX1 = self.index_BQ[:, at, None]
        keys = torch.arange(seen.start, seen.stop, device=index_BX1.device)
        hidden = keys > index_BX1
        if self.reach is not None:
            hidden = hidden | (keys <= index_BX1 - self.reach)
        return hidden if self.first_BQ is None else hidden | (keys < self.first_BQ[:, at, None])


def attend_first(
    queries_BhTD: Tensor, step0: KeysValues, layout: StepLayout, *, scale: float, path: Path | None = None
) -> tuple[Tensor, Tensor]:
    """softmax over the step-0 keys in sight times their values, [B, h, T, D], and its log-sum-exp, [B, h, T] fp32.

    `step0`: keys and values [B, G, T, D]. Under autocast products are formed in its type, softmax in fp32. `path` None
    chooses by device and size.
    """
    queries_BhTD, keys_BGTD, values_BGTD = _in_one_type(queries_BhTD, *step0)
    with torch.autocast(queries_BhTD.device.type, enabled=False):
        if (path or choose(keys_BGTD)) == "flex":
            return _flex(queries_BhTD, keys_BGTD, values_BGTD, layout, scale)
        queries = layout.queries(queries_BhTD.shape[2], queries_BhTD.device)
        return _chunked(queries_BhTD, keys_BGTD, values_BGTD, queries, scale)


def attend_later(
    queries_hND: Tensor,
    step0: KeysValues,
    later: Sequence[KeysValues],
    places_N: Tensor,
    layout: StepLayout,
    *,
    scale: float,
    path: Path | None = None,
) -> Tensor:
    """softmax over [step-0 keys in sight ; later steps' keys at q] times their values, [h, N, D], at places of [B * T].

    `step0` [B, G, T, D] as for attend_first; `later`: keys and values [G, N, D] of steps 1..s, the query's own last.
    `places_N` rise, and are the same in every call with one layout.
    """
    batch, groups, tokens, head_dim = step0[0].shape
    heads, num_places, _ = queries_hND.shape
    # Making a grid would wait for a device; its queries stand at their places instead.
    grid = layout.grid(places_N, batch, tokens) if places_N.device.type == "cpu" and path != "flex" else None
    cell_N, width = (places_N, tokens) if grid is None else (grid.cell_N, grid.index_BQ.shape[1])
    placed = queries_hND.new_zeros(batch * width, heads, head_dim)
    placed = placed.index_copy(0, cell_N, queries_hND.transpose(0, 1))
    placed_BhQD = placed.view(batch, width, heads, head_dim).transpose(1, 2)
    of_step = layout.at(len(later))
    if grid is None:
        attended_BhQD, lse_BhQ = attend_first(placed_BhQD, step0, of_step, scale=scale, path=path)
    else:
        placed_BhQD, keys_BGTD, values_BGTD = _in_one_type(placed_BhQD, *step0)
        with torch.autocast("cpu", enabled=False):
            attended_BhQD, lse_BhQ = _chunked(placed_BhQD, keys_BGTD, values_BGTD, of_step.queries_at(grid), scale)
    attended_NhD = attended_BhQD.transpose(1, 2).flatten(0, 1).index_select(0, cell_N)
    lse_Nh = lse_BhQ.transpose(1, 2).flatten(0, 1).index_select(0, cell_N)

    queries_hND, *own = _in_one_type(queries_hND, *(tensor for pair in later for tensor in pair))
    with torch.autocast(queries_hND.device.type, enabled=False):
        queries_GrND = queries_hND.view(groups, -1, num_places, head_dim)
        scores = [lse_Nh.T.view(groups, -1, num_places)]
        scores += [(queries_GrND * keys_GND[:, None]).sum(-1, dtype=torch.float32) * scale for keys_GND in own[::2]]
        shares = torch.stack(scores).softmax(0).unsqueeze(-1)
        merged_GrND = shares[0] * attended_NhD.transpose(0, 1).reshape(queries_GrND.shape).float()
        for share, values_GND in zip(shares[1:], own[1::2], strict=True):
            merged_GrND = torch.addcmul(merged_GrND, share, values_GND[:, None].float())
        return merged_GrND.to(attended_NhD.dtype).view(heads, num_places, head_dim)


def _in_one_type(*tensors: Tensor) -> list[Tensor]:
    """All in autocast's type where that is on, else in that of the last (values)."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[-1].dtype
    return [tensor.to(dtype) for tensor in tensors]


def choose(keys_BGTD: Tensor) -> Path:
    """flex on CUDA where its kernels fit and have enough to do, else chunked."""
    fits = keys_BGTD.shape[-1] >= _FLEX_LEAST_HEAD_DIM and keys_BGTD.shape[2] >= _FLEX_LEAST_TOKENS
    return "flex" if keys_BGTD.is_cuda and fits else "chunked"


def _chunked(q_BhQD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, queries: Queries, scale: float) -> tuple[Tensor, Tensor]:
    attended, lse = _FirstStepAttention.apply(q_BhQD, k_BGTD, v_BGTD, queries, scale)  # type: ignore[no-untyped-call]
    return attended, lse


class _FirstStepAttention(torch.autograd.Function):
    """Attention to step-0 keys, and its log-sum-exp: [B, h, Q, D] and [B, h, Q] fp32.

    Keeps no scores: p = exp(s - lse) is formed again in backward, ds = p * (dp - sum(do * o) + dlse).
    """

    @staticmethod
    def forward(
        ctx: Any, q_BhQD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, queries: Queries, scale: float
    ) -> tuple[Tensor, Tensor]:
        out_BhQD = torch.empty_like(q_BhQD, memory_format=torch.contiguous_format)
        lse_BhQ = torch.empty(q_BhQD.shape[:-1], dtype=torch.float32, device=q_BhQD.device)
        for at, seen in _chunks(q_BhQD, k_BGTD, queries):
            scores = _scores(q_BhQD, k_BGTD, at, seen, queries, scale)
            lse = scores.logsumexp(-1)
            probs = scores.sub_(lse.unsqueeze(-1)).exp_()
            out_BhQD[:, :, at] = (probs.to(v_BGTD.dtype) @ v_BGTD[:, :, seen]).view_as(out_BhQD[:, :, at])
            lse_BhQ[:, :, at] = lse.view_as(lse_BhQ[:, :, at])
        ctx.save_for_backward(q_BhQD, k_BGTD, v_BGTD, out_BhQD, lse_BhQ)
        ctx.queries, ctx.scale = queries, scale
        return out_BhQD, lse_BhQ

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BhQD, k_BGTD, v_BGTD, out_BhQD, lse_BhQ = ctx.saved_tensors
        dout_BhQD, dlse_BhQ = grads
        groups = k_BGTD.shape[1]
        offset_BhQ = dlse_BhQ - (dout_BhQD.float() * out_BhQD.float()).sum(-1)
        dq_BhQD = torch.empty_like(out_BhQD)
        dk_BGTD, dv_BGTD = torch.zeros_like(k_BGTD, dtype=torch.float32), torch.zeros_like(v_BGTD, dtype=torch.float32)
        for at, seen in _chunks(q_BhQD, k_BGTD, ctx.queries):
            scores = _scores(q_BhQD, k_BGTD, at, seen, ctx.queries, ctx.scale)
            probs = scores.sub_(_grouped(lse_BhQ[:, :, at, None], groups)).exp_()
            dout = _grouped(dout_BhQD[:, :, at], groups)
            dv_BGTD[:, :, seen] += probs.to(dout.dtype).mT @ dout
            dscores = (dout @ v_BGTD[:, :, seen].mT).float().add_(_grouped(offset_BhQ[:, :, at, None], groups))
            dscores = dscores.mul_(probs).mul_(ctx.scale).to(k_BGTD.dtype)
            dq_BhQD[:, :, at] = (dscores @ k_BGTD[:, :, seen]).view_as(dq_BhQD[:, :, at])
            dk_BGTD[:, :, seen] += dscores.mT @ _grouped(q_BhQD[:, :, at], groups)
        return dq_BhQD, dk_BGTD.to(k_BGTD.dtype), dv_BGTD.to(v_BGTD.dtype), None, None


def _chunks(q_BhQD: Tensor, k_BGTD: Tensor, queries: Queries) -> Iterator[tuple[slice, slice]]:
    """Slices of the queries, and the slice of keys any query of theirs sees."""
    batch, heads, num_queries, _ = q_BhQD.shape
    num_tokens = k_BGTD.shape[2]
    most = _CHUNK_ELEMENTS_CPU if q_BhQD.device.type == "cpu" else _CHUNK_ELEMENTS
    size = queries_a_chunk(most, batch * heads * num_tokens)
    for start in range(0, num_queries, size):
        at = slice(start, min(start + size, num_queries))
        yield at, queries.seen(at, num_tokens)


def _scores(q_BhQD: Tensor, k_BGTD: Tensor, at: slice, seen: slice, queries: Queries, scale: float) -> Tensor:
    """[B, G, h/G * X, keys] fp32, -inf at keys out of sight."""
    scores = (_grouped(q_BhQD[:, :, at], k_BGTD.shape[1]) @ k_BGTD[:, :, seen].mT).float() * scale
    batch, groups, _, keys = scores.shape
    hidden = queries.hidden(at, seen)
    scores.view(batch, groups, -1, hidden.shape[1], keys).masked_fill_(hidden[:, None, None], -math.inf)
    return scores


def _grouped(x_BhTD: Tensor, num_kv_heads: int) -> Tensor:
    """[B, h, T, D] -> [B, G, h/G * T, D]: the query heads that share a kv head, one after another."""
    batch, heads, tokens, size = x_BhTD.shape
    return x_BhTD.reshape(batch, num_kv_heads, heads // num_kv_heads * tokens, size)


def _flex(q_BhTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, layout: StepLayout, scale: float) -> tuple[Tensor, Tensor]:
    kernel: Any = _compiled_flex() if q_BhTD.is_cuda else flex_attention
    attended_BhTD, aux = kernel(
        q_BhTD,
        k_BGTD,
        v_BGTD,
        block_mask=layout.flex_mask(q_BhTD.shape[2], q_BhTD.device),
        scale=scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return attended_BhTD, aux.lse


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)
