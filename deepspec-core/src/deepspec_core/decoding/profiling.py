"""Measures the time of one step of a target, by the number of sequences and of new tokens per sequence.

A step is the target's part of verification: one forward pass over the new tokens of every sequence, with the logits of
all of them. Knows targets. Does not know proposals, sampling or files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from attrs import frozen

from deepspec_core.contracts.target import TargetModel
from deepspec_core.decoding.out_of_memory import is_out_of_memory
from deepspec_core.errors import TargetError

# Every shape is measured in each of these turns, so that a disturbance of the machine does not hit one shape alone.
TURNS = 3
_WARM_UP = 2


@frozen(kw_only=True)
class Step:
    """The time of one step of `requests` sequences with `tokens` new tokens in all: the median, and the quartiles."""

    requests: int
    tokens: int
    seconds: float
    lower_quartile: float
    upper_quartile: float
    repeats: int


@torch.no_grad()
def measure_steps(
    target: TargetModel, *, batch_sizes: Sequence[int], widths: Sequence[int], context: int, repeats: int, seed: int
) -> list[Step]:
    """Time every pair of a number of sequences and a number of new tokens a sequence.

    Each sequence has `context` committed random tokens. `repeats` are those of each pair, at least TURNS. TargetError
    where a batch does not fit the device's memory.
    """
    taken: dict[tuple[int, int], list[float]] = {(size, width): [] for size in batch_sizes for width in widths}
    generator = torch.Generator().manual_seed(seed)
    for turn in range(TURNS):
        count = repeats // TURNS + (turn < repeats % TURNS)
        for size in batch_sizes:
            try:
                seconds = _turn(target, size, widths, context, count, generator)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise TargetError(
                    "a batch does not fit the memory",
                    where=f"{size} sequences of {context + max(widths)} tokens",
                    found=str(error).splitlines()[0] if str(error) else type(error).__name__,
                    fix="Leave this batch size out, or take a shorter context.",
                ) from error
            for width in widths:
                taken[size, width] += seconds[width]
    return [_step(size, width, seconds) for (size, width), seconds in taken.items()]


def _turn(
    target: TargetModel, size: int, widths: Sequence[int], context: int, count: int, generator: torch.Generator
) -> dict[int, list[float]]:
    device, vocabulary = target.device, target.architecture.vocab_size
    target.open_slots(size, context + max(widths) + 1)
    slots_B = torch.arange(size, device=device)
    positions_T = torch.arange(context + max(widths), device=device)
    # One by one: prefill of all at once would take more memory than any step.
    for slot in range(size):
        ids_1T = torch.randint(vocabulary, (1, context), generator=generator).to(device)
        own_1 = slots_B[slot : slot + 1]
        target.decode(own_1, ids_1T, positions_T[None, :context], (), last_only=True)
        target.commit(own_1, torch.full_like(own_1, context))
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    for repeat in range(_WARM_UP + count):
        for width in widths:
            ids_BT = torch.randint(vocabulary, (size, width), generator=generator).to(device)
            positions_BT = positions_T[context : context + width].expand(size, width)
            _wait(device)
            start = time.perf_counter()
            # Nothing is committed, so every step begins at the same context.
            target.decode(slots_B, ids_BT, positions_BT, ())
            _wait(device)
            if repeat >= _WARM_UP:
                seconds[width].append(time.perf_counter() - start)
    target.commit(slots_B, torch.zeros_like(slots_B))
    return seconds


def _step(size: int, width: int, seconds: Sequence[float]) -> Step:
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Step(
        requests=size,
        tokens=size * width,
        seconds=float(middle),
        lower_quartile=float(low),
        upper_quartile=float(high),
        repeats=len(seconds),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
