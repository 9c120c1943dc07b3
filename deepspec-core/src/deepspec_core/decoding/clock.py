"""Measures where decoding spends its time. Knows parts by name, and how to wait for a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from attrs import define


@define
class Clock:
    """Seconds spent in each part of decoding. `host` is the rest of the engine's time.

    `now` reads the time: from the wall clock, or, if other work shares the machine, from the process's own CPU clock.
    """

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    wall: float = 0.0
    now: Callable[[], float] = time.perf_counter

    @property
    def host(self) -> float:
        """Seconds spent in none of the parts."""
        return self.wall - self.prefill - self.draft - self.verify

    @contextmanager
    def measure(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the time of the block to `part`. Waits for the device before and after the block."""
        _synchronize(device)
        start = self.now()
        yield
        _synchronize(device)
        setattr(self, part, getattr(self, part) + self.now() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
