"""The figures of a step's time: means over the steps since the last line, and the slowest of several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepspec_core.training import pace as pace_module
from deepspec_core.training.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pace_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(pace_module, "peak_bytes", lambda device: 5)
    return now


def step(pace: Pace, clock: list[float], *, own: float, waits: float) -> None:
    pace.begin()
    clock[0] += own
    pace.exchange()
    clock[0] += waits
    pace.end()


def test_own_time_ends_where_a_rank_waits_for_others(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    other = (0.25, 7)
    told: list[Any] = []

    def gathered(value: Any) -> list[Any]:
        told.append(value)
        return [other, value]

    monkeypatch.setattr(pace_module, "gathered", gathered)
    pace = Pace(torch.device("cpu"))
    step(pace, clock, own=1.0, waits=0.5)
    step(pace, clock, own=2.0, waits=0.5)
    assert pace.figures() == {
        "step_seconds": 2.0, "peak_memory_bytes": 7, "slowest_rank": 1, "slowest_rank_seconds": 1.5,
        "fastest_rank_seconds": 0.25,
    }  # fmt: skip
    step(pace, clock, own=0.125, waits=0.5)
    assert pace.figures()["slowest_rank"] == 0
    assert told == [(1.5, 5), (0.125, 5)]


def test_what_is_done_between_steps_is_left_out_where_it_is_said(clock: list[float]) -> None:
    pace = Pace(torch.device("cpu"))
    clock[0] += 100.0
    pace.restart()
    step(pace, clock, own=1.0, waits=0.0)
    assert pace.figures() == {"step_seconds": 1.0, "peak_memory_bytes": 5}


@pytest.mark.gpu
def test_on_a_device_nothing_waits_for_the_clock() -> None:
    device = torch.device("cuda")
    pace, factor = Pace(device), torch.ones(2048, 2048, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pace.begin()
        for _ in range(20):
            factor = (factor @ factor).clamp(-1, 1)
        pace.exchange()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    pace.end()
    assert pace.figures()["step_seconds"] > 0
    assert pace._own == 0.0
