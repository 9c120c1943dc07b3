"""The warning about runs of too few steps: when it is given, and what it says."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from deepspec_core.config.schema import TrainOptions
from deepspec_core.pipeline.few_steps import FEWEST, warn_before, warn_exactly


def warned(
    caplog: pytest.LogCaptureFixture, samples: int, *, limit: int | None, smoke: bool = False, **train: Any
) -> list[str]:
    """What a run says before its first stage and when its samples are counted."""
    caplog.clear()
    run: Any = SimpleNamespace(
        smoke=smoke,
        file=SimpleNamespace(train=TrainOptions(global_batch_size=10, **train)),
        data=SimpleNamespace(expected_conversations=lambda: limit),
    )
    with caplog.at_level(logging.WARNING, "deepspec"):
        warn_before(run)
        before = len(caplog.messages)
        warn_exactly(run, samples)
    return ["before"] * before + ["exactly"] * (len(caplog.messages) - before)


def test_it_is_said_as_early_as_it_is_known(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(caplog, 5000, limit=None, max_steps=20) == ["before"]
    assert "training takes at most 20 optimizer steps: with fewer than 300" in caplog.text
    assert warned(caplog, 100, limit=120, epochs=10) == ["before", "exactly"]
    assert "at most 120 optimizer steps" in caplog.text
    assert warned(caplog, 100, limit=None, epochs=10) == ["exactly"]
    assert "training takes 100 optimizer steps" in caplog.text
    # So many conversations may have been dropped that too few are left.
    assert warned(caplog, 100, limit=10 * FEWEST, epochs=1) == ["exactly"]
    assert warned(caplog, 10 * FEWEST, limit=10 * FEWEST, epochs=1) == []


def test_a_part_of_an_epoch_is_said(caplog: pytest.LogCaptureFixture) -> None:
    warned(caplog, 4000, limit=4000, max_steps=100)
    assert "at most 100 optimizer steps, 25% of an epoch" in caplog.text


def test_a_smoke_run_and_enough_steps_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(caplog, 16, limit=16, epochs=1, smoke=True) == []
    assert warned(caplog, 10 * FEWEST, limit=None, epochs=1) == []
    assert warned(caplog, 100, limit=None, epochs=10, max_steps=FEWEST) == ["exactly"]
