"""Two processes train one draft in shards, and something of them is lost: both end within a minute and say what it was.

Where nobody started them together, as on two machines, they have each other only.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from test_stopping import COMMAND, WITHIN_SECONDS, _checkpoints, _long_training, _processes_of, _steps_logged, _wait

pytestmark = pytest.mark.slow

SHARDS = ["--set", "train.parallel=fsdp", "--set", "train.log_every=1", "--set", "run.threads=1"]
_RAISES = """
import sys
from deepspec_core.cli.main import main
from deepspec_core.training import trainer

class Sums(trainer.StepSums):
    steps = 0
    def reduce(self, names, flag):
        Sums.steps += 1
        if Sums.steps == 4:
            raise ValueError("something of this rank's own")
        return super().reduce(names, flag)

trainer.StepSums = Sums
sys.exit(main(sys.argv[1:]))
"""
_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
from deepspec_core.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


class Pair:
    """Two ranks with a training that is too long to end by itself, started one by one."""

    def __init__(self, run_file: Path) -> None:
        self.run_file, self.folder = run_file, run_file.parent / "runs" / "quickstart-dflash"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.ranks: list[subprocess.Popen[str]] = []

    def start(self, *code: str) -> None:
        """The next rank; `code`: what it runs in place of `deepspec`."""
        rank = str(len(self.ranks))
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "OMP_NUM_THREADS": "1"}
        said = (self.run_file.parent / f"said-{rank}").open("w")
        command = [sys.executable, *(code or ("-m", "deepspec_core")), "run", str(self.run_file), *SHARDS]
        self.ranks.append(
            subprocess.Popen(command, env={**os.environ, **own, **meeting}, stdout=said, stderr=said, text=True)
        )

    def said(self, rank: int) -> str:
        return (self.run_file.parent / f"said-{rank}").read_text()

    def end(self) -> list[int]:
        """Exit codes of both, which end within a minute."""
        until = time.monotonic() + WITHIN_SECONDS
        return [rank.wait(timeout=max(0.1, until - time.monotonic())) for rank in self.ranks]


@pytest.fixture
def pair(finished: Path, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(_long_training(finished, tmp_path))
    yield made
    for rank in made.ranks:
        rank.kill()
        rank.wait()


def test_a_rank_that_raises(pair: Pair) -> None:
    pair.start()
    pair.start("-c", _RAISES)
    pair.ranks[1].wait(timeout=240)
    assert pair.end() == [2, 1]
    assert "ValueError: something of this rank's own" in pair.said(1)
    assert "Worker 1 of 2 ended, so worker 0 ends too" in pair.said(0)
    assert "something of this rank's own" in pair.said(0)
    assert "Traceback" not in pair.said(0)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed(pair: Pair, lost: int) -> None:
    pair.start()
    pair.start()
    _wait(lambda: _steps_logged(pair.folder) >= 3, pair.ranks[0])
    pair.ranks[lost].kill()
    codes = pair.end()
    assert codes[lost] == -signal.SIGKILL
    other = 1 - lost
    assert codes[other] == 2
    assert "Traceback" not in pair.said(other)
    named = f"Worker {lost} of 2 ended" if lost else "cannot reach each other any more"
    assert named in pair.said(other)


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


def test_a_loader_worker_that_is_killed(finished: Path, tmp_path: Path) -> None:
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    command = [*COMMAND, str(run_file), *SHARDS, "--workers", "2", "--set", "train.loader_workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait(lambda: _steps_logged(folder) >= 3, process)
    ranks = [pid for pid in _children(process.pid) if pid in _processes_of(run_file)]
    loaders = [pid for rank in ranks for pid in _children(rank) if pid in _processes_of(run_file)]
    assert len(loaders) == 2
    os.kill(loaders[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode == 2
    assert "a loader worker ended" in errors
    assert "killed by signal: Killed" in errors or "exited unexpectedly" in errors
    assert "Traceback" not in errors
    assert _processes_of(run_file) == []


def test_no_room_for_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    """Files that may not grow beyond a limit take the place of a full disk: both refuse the same writes."""
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    own = ["run", str(run_file), *SHARDS, "--workers", "2", "--set", "train.checkpoint_every=2"]
    limited = [sys.executable, "-c", _LIMITED, *own]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 2, done.stderr
    assert "There is no room to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert _processes_of(run_file) == []
    assert _checkpoints(folder) == []
