"""An error that follows from what happened elsewhere is told as what happened there."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from attrs import evolve
from test_trainer import OPTIONS, SAMPLES, run

from deepspec_core.contracts.draft import Sample
from deepspec_core.crew import ALONE, Crew
from deepspec_core.errors import StageError, TrainingError
from deepspec_core.testing.tiny_draft import TinySource


class Killing(TinySource):
    """The loader worker that reads the third sample is killed."""

    main = os.getpid()

    def __getitem__(self, index: int) -> Sample:
        if os.getpid() != self.main and index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_dead_loader_worker(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"(?s)a loader worker ended.*(killed by signal: Killed|exited unexpectedly)"
    ):
        run(tmp_path, evolve(OPTIONS, loader_workers=1), source=Killing(SAMPLES))


class NoStore:
    """A store that is not asked."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes:
        return b""

    def check(self, keys: list[str], /) -> bool:
        return False

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        return b""


def test_a_broken_operation_of_all_ranks_is_the_loss_of_one() -> None:
    crew, lost = Crew(rank=0, count=2, store=NoStore()), StageError("Worker 1 of 2 ended")
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:27614")
    threading.Timer(0.3, crew.notice, args=(lost,)).start()
    assert crew.cause_of(broken) is lost
    assert crew.cause_of(broken) is lost


def test_errors_of_ones_own_are_told_at_once() -> None:
    crew = Crew(rank=0, count=2, store=NoStore())
    for error in (RuntimeError("shapes do not match"), ValueError("gloo"), TrainingError("NCCL"), KeyboardInterrupt()):
        assert crew.cause_of(error) is error
    alone = RuntimeError("gloo")
    assert ALONE.cause_of(alone) is alone
