"""Floating-point operations of products: two for each multiplication and addition.

torch's counter knows matrix products and attention kernels of accelerators; the CPU's attention kernels are added here.
Attention is counted whole, masked or not, and what backward forms again counts again. Element-wise work is not counted.

Legend: B batch, h query heads, Q queries, K keys, D head size, E value size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

_Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """A counter whose `get_total_flops()` is what has run under it so far."""
    counter: Any = FlopCounterMode(display=False, custom_mapping=dict(_CPU_ATTENTION))
    counter.mod_tracker = _OneModule()
    return cast(FlopCounterMode, counter)


class _OneModule:
    """In the place of torch's record of which module runs: its hooks keep alive what layers compute again."""

    parents: ClassVar = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _attention(query_BhQD: _Shape, key_BGKD: _Shape, value_BGKE: _Shape, *_: Any, **__: Any) -> int:
    """q k^T and p v."""
    return _scores(query_BhQD, key_BGKD) * 2 * (query_BhQD[-1] + value_BGKE[-1])


def _attention_backward(
    _gradient: _Shape, query_BhQD: _Shape, key_BGKD: _Shape, value_BGKE: _Shape, *_: Any, **__: Any
) -> int:
    """Scores again, dp and dv through p v, dq and dk through q k^T."""
    return _scores(query_BhQD, key_BGKD) * 2 * (3 * query_BhQD[-1] + 2 * value_BGKE[-1])


def _scores(query_BhQD: _Shape, key_BGKD: _Shape) -> int:
    batch, heads, queries, _ = query_BhQD
    return batch * heads * queries * key_BGKD[2]


_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
