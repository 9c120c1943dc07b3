"""What is said about a stage's progress where there is no terminal."""

import logging

import pytest

import deepspec_core.progress as progress_module
from deepspec_core.progress import Progress, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_one_at_the_end(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "deepspec")
    with Progress(1000, "train", "steps", done=100) as progress:
        for step in range(50):
            clock[0] += 0.5
            progress.advance(loss=step / 10)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "train: 120 of 1,000 steps, 2 steps/s, 7:20 left, loss 1.9",
        "train: 140 of 1,000 steps, 2 steps/s, 7:10 left, loss 3.9",
        "train: 150 of 1,000 steps, 2 steps/s, 7:05 left, loss 4.9",
    ]


def test_other_ranks_are_silent_and_totals_may_be_unknown(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "deepspec")
    with Progress(5, "train", "steps", enabled=False) as progress:
        clock[0] += 60
        progress.advance()
    assert not caplog.records
    assert list(track(iter("abc"), "read", "rows")) == ["a", "b", "c"]
    assert caplog.records[-1].getMessage().startswith("read: 3 rows")
    assert list(track([1, 2], "read", "rows")) == [1, 2]
    assert caplog.records[-1].getMessage().startswith("read: 2 of 2 rows")
