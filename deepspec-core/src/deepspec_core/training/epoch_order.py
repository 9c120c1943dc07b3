"""The order in which an epoch visits its samples. Each `step_size` consecutive samples make up an optimizer step.

Knows lengths and random numbers. Does not know steps, ranks or rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

# order(lengths, step_size, generator): a permutation of the samples
Order = Callable[[Sequence[int], int, torch.Generator], np.ndarray[Any, np.dtype[np.int64]]]

# A bucket has samples of similar length from one pool. Larger pools need less padding; smaller pools mix steps more.
_POOL_STEPS: Final = 64
_FEWEST_POOLS: Final = 4


def shuffled(lengths: Sequence[int], _step_size: int, generator: torch.Generator) -> np.ndarray[Any, Any]:
    """A random order. All orders are equally probable."""
    return torch.randperm(len(lengths), generator=generator).numpy()


def bucketed(lengths: Sequence[int], step_size: int, generator: torch.Generator) -> np.ndarray[Any, Any]:
    """Steps of samples of like length, in random order.

    The samples are shuffled and cut into at least 4 pools of at most 64 steps, each pool is sorted by length and cut
    into steps, and the steps of all pools are shuffled. So steps differ from epoch to epoch, also where one pool would
    hold all samples. Samples that fill no whole step are drawn from all, and come last.
    """
    order = shuffled(lengths, step_size, generator)
    steps = len(order) // step_size
    if steps == 0:
        return order
    whole, rest = order[: steps * step_size], order[steps * step_size :]
    pools = min(steps, max(_FEWEST_POOLS, -(-steps // _POOL_STEPS)))
    sizes = np.array(lengths, dtype=np.int64)
    by_step = [
        # Stable: samples of one length stay in the order of the shuffle.
        pool.flatten()[np.argsort(-sizes[pool.flatten()], kind="stable")].reshape(pool.shape)
        for pool in np.array_split(whole.reshape(steps, step_size), pools)
    ]
    mixed = np.concatenate(by_step)[torch.randperm(steps, generator=generator).numpy()]
    return np.concatenate([mixed.flatten(), rest])


# By [train] batching. Packing rows leaves steps as they are.
ORDERS: Final[Mapping[str, Order]] = {"padded": shuffled, "bucketed": bucketed, "packed": shuffled}
