"""Who attends to whom in test-time training: step-0 keys at and before the query, and its own keys of later steps.

Index q at step s attends to the step-0 keys of indices first..q, `first` being where its document begins, and to the
keys of steps 1..s at index q alone. The two parts are merged by log-sum-exp, so no [T, S * T] scores exist, whatever
the number of steps. Its position is q + s: with a window W it sees no step-0 key before q + s - W + 1. W is larger than
any s, so its own keys are in sight. Knows this pattern only; projections and norms are others'.

Step 0 runs over whole sequences, [B, T]. Later steps run over a list of places of the flattened batch, those something
is predicted from: only the first part knows about sequences, and it sees their queries put back in place. It has two
paths with the same numbers:

- `chunked`: scores of some queries at a time, formed again in backward. Exact on any device.
- `flex`: flex_attention's kernels, on CUDA where there is enough to do for them.

Legend: B sequences, T tokens, N places, X queries of a chunk, h query heads, G kv heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from deepspec_core.layers.interval_mask import interval_mask

Path = Literal["chunked", "flex"]
KeysValues = tuple[Tensor, Tensor]

_CHUNK_ELEMENTS = 1 << 26  # first-part scores held at once: 256 MiB in fp32
_CHUNK_ELEMENTS_CPU = 1 << 21  # what caches hold
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

    def at(self, step: int) -> StepLayout:
        """The layout of a later step, whose queries stand `step` positions further on than their index."""
        if self.reach is None or step == 0:
            return self
        assert self.reach > step
        # Every layer of a step asks for the same mask.
        return self._steps.setdefault(step, StepLayout(self.first_BT, self.reach - step))

    @cached_property
    def on_host(self) -> bool:
        """Whether reading `first` costs nothing."""
        return self.first_BT is not None and self.first_BT.device.type == "cpu"

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


def attend_first(
    queries_BhTD: Tensor, step0: KeysValues, layout: StepLayout, *, scale: float, path: Path | None = None
) -> tuple[Tensor, Tensor]:
    """softmax over the step-0 keys in sight times their values, [B, h, T, D], and its log-sum-exp, [B, h, T] fp32.

    `step0`: keys and values [B, G, T, D]. Under autocast products are formed in its type, softmax in fp32. `path` None
    chooses by device and size.
    """
    queries_BhTD, keys_BGTD, values_BGTD = _in_one_type(queries_BhTD, *step0)
    with torch.autocast(queries_BhTD.device.type, enabled=False):
        if (path or choose(queries_BhTD)) == "flex":
            return _flex(queries_BhTD, keys_BGTD, values_BGTD, layout, scale)
        attended_BhTD, lse_BhT = _FirstStepAttention.apply(  # type: ignore[no-untyped-call]
            queries_BhTD, keys_BGTD, values_BGTD, layout, scale
        )
        return attended_BhTD, lse_BhT


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
    """
    batch, groups, tokens, head_dim = step0[0].shape
    heads, num_places, _ = queries_hND.shape
    placed = queries_hND.new_zeros(batch * tokens, heads, head_dim)
    placed = placed.index_copy(0, places_N, queries_hND.transpose(0, 1))
    placed_BhTD = placed.view(batch, tokens, heads, head_dim).transpose(1, 2)
    attended_BhTD, lse_BhT = attend_first(placed_BhTD, step0, layout.at(len(later)), scale=scale, path=path)
    attended_NhD = attended_BhTD.transpose(1, 2).flatten(0, 1).index_select(0, places_N)
    lse_Nh = lse_BhT.transpose(1, 2).flatten(0, 1).index_select(0, places_N)

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


def choose(queries_BhTD: Tensor) -> Path:
    """flex on CUDA where its kernels fit and have enough to do, else chunked."""
    fits = queries_BhTD.shape[-1] >= _FLEX_LEAST_HEAD_DIM and queries_BhTD.shape[2] >= _FLEX_LEAST_TOKENS
    return "flex" if queries_BhTD.is_cuda and fits else "chunked"


class _FirstStepAttention(torch.autograd.Function):
    """Attention to step-0 keys, and its log-sum-exp: [B, h, T, D] and [B, h, T] fp32.

    Keeps no scores: p = exp(s - lse) is formed again in backward, ds = p * (dp - sum(do * o) + dlse).
    """

    @staticmethod
    def forward(
        ctx: Any, q_BhTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, layout: StepLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        out_BhTD = torch.empty_like(q_BhTD, memory_format=torch.contiguous_format)
        lse_BhT = torch.empty(q_BhTD.shape[:-1], dtype=torch.float32, device=q_BhTD.device)
        for at, seen in _chunks(q_BhTD, layout):
            scores = _scores(q_BhTD, k_BGTD, at, seen, layout, scale)
            lse = scores.logsumexp(-1)
            probs = scores.sub_(lse.unsqueeze(-1)).exp_()
            out_BhTD[:, :, at] = (probs.to(v_BGTD.dtype) @ v_BGTD[:, :, seen]).view_as(out_BhTD[:, :, at])
            lse_BhT[:, :, at] = lse.view_as(lse_BhT[:, :, at])
        ctx.save_for_backward(q_BhTD, k_BGTD, v_BGTD, out_BhTD, lse_BhT)
        ctx.layout, ctx.scale = layout, scale
        return out_BhTD, lse_BhT

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BhTD, k_BGTD, v_BGTD, out_BhTD, lse_BhT = ctx.saved_tensors
        dout_BhTD, dlse_BhT = grads
        groups = k_BGTD.shape[1]
        offset_BhT = dlse_BhT - (dout_BhTD.float() * out_BhTD.float()).sum(-1)
        dq_BhTD = torch.empty_like(out_BhTD)
        dk_BGTD, dv_BGTD = torch.zeros_like(k_BGTD, dtype=torch.float32), torch.zeros_like(v_BGTD, dtype=torch.float32)
        for at, seen in _chunks(q_BhTD, ctx.layout):
            scores = _scores(q_BhTD, k_BGTD, at, seen, ctx.layout, ctx.scale)
            probs = scores.sub_(_grouped(lse_BhT[:, :, at, None], groups)).exp_()
            dout = _grouped(dout_BhTD[:, :, at], groups)
            dv_BGTD[:, :, seen] += probs.to(dout.dtype).mT @ dout
            dscores = (dout @ v_BGTD[:, :, seen].mT).float().add_(_grouped(offset_BhT[:, :, at, None], groups))
            dscores = dscores.mul_(probs).mul_(ctx.scale).to(k_BGTD.dtype)
            dq_BhTD[:, :, at] = (dscores @ k_BGTD[:, :, seen]).view_as(dq_BhTD[:, :, at])
            dk_BGTD[:, :, seen] += dscores.mT @ _grouped(q_BhTD[:, :, at], groups)
        return dq_BhTD, dk_BGTD.to(k_BGTD.dtype), dv_BGTD.to(v_BGTD.dtype), None, None


def _chunks(q_BhTD: Tensor, layout: StepLayout) -> Iterator[tuple[slice, slice]]:
    """Slices of the queries, and the slice of keys any query of theirs sees."""
    batch, heads, tokens, _ = q_BhTD.shape
    most = _CHUNK_ELEMENTS_CPU if q_BhTD.device.type == "cpu" else _CHUNK_ELEMENTS
    size = max(1, most // max(1, batch * heads * tokens))
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        seen = int(layout.first_BT[:, start:end].min()) if layout.first_BT is not None and layout.on_host else 0
        if layout.reach is not None:
            seen = max(seen, start + 1 - layout.reach)
        yield slice(start, end), slice(seen, end)


def _scores(q_BhTD: Tensor, k_BGTD: Tensor, at: slice, seen: slice, layout: StepLayout, scale: float) -> Tensor:
    """[B, G, h/G * X, keys] fp32, -inf at keys out of sight: after the query, before its document, beyond its reach."""
    scores = (_grouped(q_BhTD[:, :, at], k_BGTD.shape[1]) @ k_BGTD[:, :, seen].mT).float() * scale
    queries_X = torch.arange(at.start, at.stop, device=scores.device)
    keys = torch.arange(seen.start, seen.stop, device=scores.device)
    hidden = (keys > queries_X[:, None])[None]
    if layout.reach is not None:
        hidden = hidden | (keys <= queries_X[:, None] - layout.reach)
    if layout.first_BT is not None:
        hidden = hidden | (keys < layout.first_BT[:, at, None])
    batch, groups = scores.shape[:2]
    scores.view(batch, groups, -1, len(queries_X), len(keys)).masked_fill_(hidden[:, None, None], -math.inf)
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
