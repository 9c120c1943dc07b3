"""The trained weights that products read: one copy in the dtype of products for each update, not one for each use.

Weights are trained in fp32 and multiplied in bf16. Autocast would cast each of them in every micro-batch, and backward
would form its gradient in bf16, cast it to fp32 in new memory and add that. Here a copy is made when a weight has
changed, and its gradient is added to the weight's where it stands. The gradient of an embedding, which is zero but for
the rows that were read, is added row by row. Rounding is that of autocast.

Knows linear layers and embeddings of any module. Does not know drafts, losses or optimizers.

Legend: ... any leading dimensions, V rows of an embedding, r its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ProductWeights:
    """The weights of a module's linear layers, in `dtype`, and its embeddings' gradients.

    alone: Whether backward in this process is all that makes gradients. Then they are added to `weight.grad` directly.
        Otherwise they go through autograd, which tells data parallelism of them.

    Copies are made in every forward pass, unless `follow` has named the optimizer that changes the weights.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, alone: bool) -> None:
        self.module, self.dtype, self.alone = module, dtype, alone
        self._follows = False
        self._kept: dict[int, tuple[Tensor, int, Tensor]] = {}

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep copies from one step of this optimizer to the next, where weights are not sharded (`alone`).

        Other changes in place are seen too, those behind `.data` excepted. A fused step is not seen by itself: it
        leaves a tensor's version as it was.
        """
        self._follows = self.alone
        optimizer.register_step_post_hook(lambda *_: self._outdate())

    def _outdate(self) -> None:
        self._kept = {key: (weight, -1, copy) for key, (weight, _, copy) in self._kept.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, linear layers have the copies for weights. Their gradients are the weights'.

        Parameters are looked up anew each time, because sharding puts whole weights in their place before a pass.
        """
        swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        watched: list[nn.Module] = []
        copies: dict[int, Tensor] = {}
        try:
            for part in self.module.modules():
                if isinstance(part, nn.Linear):
                    for name, weight in part._parameters.items():
                        if weight is not None and weight.requires_grad and weight.dtype != self.dtype:
                            swapped.append((part, name, weight))
                            # A plain tensor may stand where a parameter does, as in torch.func.functional_call.
                            part._parameters[name] = self._copy(weight, copies)  # type: ignore[assignment]
                elif self.alone and type(part) is nn.Embedding and _is_plain(part):
                    watched.append(part)
                    part.forward = partial(_embed, part.weight)  # type: ignore[method-assign]
            yield
        finally:
            for part, name, weight in swapped:
                part._parameters[name] = weight
            for part in watched:
                del part.forward

    def _copy(self, weight: Tensor, copies: dict[int, Tensor]) -> Tensor:
        """The copy of this pass, part of its graph. Layers that share a weight share it."""
        if id(weight) not in copies:
            copy: Tensor = _Copied.apply(weight, self)  # type: ignore[no-untyped-call]
            copies[id(weight)] = copy
        return copies[id(weight)]

    def values(self, weight: Tensor) -> Tensor:
        """A trained weight without gradient, in `dtype`."""
        if not self._follows or weight.dtype == self.dtype:
            return weight.detach().to(self.dtype)
        kept = self._kept.get(id(weight))
        if kept is None or kept[0] is not weight:
            kept = (weight, -1, torch.empty_like(weight, dtype=self.dtype, requires_grad=False))
        if kept[1] != weight._version:
            kept[2].copy_(weight.detach())
            kept = self._kept[id(weight)] = (weight, weight._version, kept[2])
        return kept[2]

    def gathers(self, weight: Tensor) -> bool:
        """Whether a gradient may be added to `weight.grad`, rather than handed to autograd."""
        return self.alone and weight.is_leaf and weight.grad is not None


class _Copied(torch.autograd.Function):
    """The values of a weight in another dtype. Backward adds to the weight's gradient, where it has one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, weights: ProductWeights) -> Tensor:
        ctx.weight, ctx.weights = weight, weights
        return weights.values(weight).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        weight = ctx.weight
        if ctx.weights.gathers(weight):
            weight.grad.add_(gradient)
            return None, None
        return gradient.to(weight.dtype), None


def _is_plain(embedding: nn.Embedding) -> bool:
    trained = embedding.weight.requires_grad
    odd = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    return trained and not odd and embedding.padding_idx is None


def _embed(weight_Vr: Tensor, ids: Tensor) -> Tensor:
    embedded_r: Tensor = _Embedded.apply(weight_Vr, ids)  # type: ignore[no-untyped-call]
    return embedded_r


class _Embedded(torch.autograd.Function):
    """Rows of an embedding, [...] -> [..., r]. Backward adds to those rows of its gradient, where it has one."""

    @staticmethod
    def forward(ctx: Any, weight_Vr: Tensor, ids: Tensor) -> Tensor:
        ctx.weight_Vr, ctx.ids = weight_Vr, ids
        return F.embedding(ids, weight_Vr)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient_r: Tensor) -> tuple[Tensor | None, None]:
        weight_Vr = ctx.weight_Vr
        into_Vr = torch.zeros_like(weight_Vr) if weight_Vr.grad is None else weight_Vr.grad
        rows = gradient_r.reshape(-1, gradient_r.shape[-1]).to(into_Vr.dtype)
        into_Vr.index_add_(0, ctx.ids.flatten(), rows)
        return (into_Vr if weight_Vr.grad is None else None), None
