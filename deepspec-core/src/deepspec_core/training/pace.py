"""The figures of speed and memory for metrics.jsonl: time per step, the slowest rank, and peak memory.

A rank's own time ends before the last backward pass of a step, in which it exchanges gradients and waits for the
others. On a CUDA device it is measured by events on the stream, so nothing waits. Knows clocks and ranks; does not know
what a step does.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from deepspec_core.evaluation.peak_memory import peak_bytes
from deepspec_core.training.reduction import gathered


class Pace:
    """Of one rank: `begin()` a step, `exchange()` before it waits for others, `end()` once the device is done.

    Then `figures()` at a line, on all ranks together.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._since, self._steps, self._own = time.perf_counter(), 0, 0.0

    def begin(self) -> None:
        """A step begins: before its first micro-batch is read."""
        self._start = self._now()

    def exchange(self) -> None:
        """The next thing that this rank does waits for others."""
        self._stop = self._now()

    def end(self) -> None:
        """The step is over, and the device has nothing left to do."""
        if self._device.type == "cuda":
            self._own += self._start.elapsed_time(self._stop) / 1000
        else:
            self._own += self._stop - self._start
        self._steps += 1

    def figures(self) -> dict[str, float]:
        """Means over the steps since the last line. Those of ranks are there where there are several."""
        seconds = time.perf_counter() - self._since
        steps = max(1, self._steps)
        ranks = gathered((self._own / steps, peak_bytes(self._device) or 0))
        line: dict[str, float] = {"step_seconds": seconds / steps}
        if memory := max(most for _, most in ranks):
            line["peak_memory_bytes"] = memory
        if len(ranks) > 1:
            own = [seconds for seconds, _ in ranks]
            slowest = max(range(len(own)), key=own.__getitem__)
            line |= {"slowest_rank": slowest, "slowest_rank_seconds": own[slowest], "fastest_rank_seconds": min(own)}
        self.restart()
        return line

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
