"""A run's workers on this machine: started together and stopped together.

The process that starts them waits and computes nothing. It passes Ctrl-C and SIGTERM on to the workers. If one worker
fails, it stops the others. If it is itself killed, the workers notice and stop. Knows processes; does not know what a
worker does.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from deepspec_core.stopping import StopRequest

log = logging.getLogger("deepspec")

# A worker that is asked to stop finishes its step and saves a checkpoint.
# A worker that is stopped because another one failed has nothing to save.
SECONDS_TO_STOP: Final = 50.0
_SECONDS_AFTER_FAILURE: Final = 10.0
_LOOK_EVERY_SECONDS: Final = 0.2
_LOOK_FOR_STARTER_SECONDS: Final = 1.0
_STARTER: Final = "DEEPSPEC_STARTED_BY"
_LOOPBACK: Final = "127.0.0.1"


def start(count: int, arguments: Sequence[str]) -> int:
    """Run `deepspec ARGUMENTS` as `count` workers; the exit code of the first one that ended otherwise than well.

    Where a signal asks to stop, the workers are asked, and killed where they take longer than SECONDS_TO_STOP. A second
    signal kills them at once.
    """
    store, port = _meeting_point(count)
    with StopRequest() as request:
        workers = [_start_one(rank, count, port, arguments) for rank in range(count)]
        try:
            return _watch(workers, request)
        finally:
            for worker in workers:
                _kill(worker)
            del store


def started_here() -> bool:
    """Whether this process is a worker that `start` started.

    A process that a worker starts inherits the environment, but has another parent.
    """
    return os.environ.get(_STARTER) == str(os.getppid())


def stop_with_starter() -> None:
    """In a worker: have it stopped as by SIGTERM once the process that started it is gone."""
    if started_here():
        threading.Thread(target=_stop_without, args=(os.getppid(),), daemon=True).start()


def _meeting_point(count: int) -> tuple[object, int]:
    """Where the workers find each other: a store in this process, on a port that is free, reached from here only."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listener = socket.create_server((_LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    store = TCPStore(_LOOPBACK, port, count, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def _start_one(rank: int, count: int, port: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    from deepspec_core.pipeline.threads import available

    environment = {
        # Each worker takes its share of the cores, unless the user said otherwise.
        "OMP_NUM_THREADS": str(max(1, available() // count)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(port),
        # PyTorch's name for a store that the starting process keeps: the first worker opens none of its own.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        _STARTER: str(os.getpid()),
    }
    # A session of its own: Ctrl-C of the terminal reaches a worker through this process only, once.
    return subprocess.Popen(
        [sys.executable, "-m", "deepspec_core", *arguments], env=environment, start_new_session=True
    )


def _watch(workers: Sequence[subprocess.Popen[bytes]], request: StopRequest) -> int:
    code, asked, until = 0, False, float("inf")
    while alive := [worker for worker in workers if worker.poll() is None]:
        ended_badly = [(rank, worker.returncode) for rank, worker in enumerate(workers) if worker.returncode]
        if not asked and (request.number is not None or ended_badly):
            asked = True
            if ended_badly:
                rank, code = ended_badly[0]
                if request.number is None:
                    log.error(
                        "worker %d of %d ended first, %s; the other workers were stopped",
                        rank,
                        len(workers),
                        _how(code),
                    )
            until = time.monotonic() + (_SECONDS_AFTER_FAILURE if ended_badly else SECONDS_TO_STOP)
            for worker in alive:
                with suppress(ProcessLookupError):
                    worker.send_signal(signal.SIGTERM)
        if time.monotonic() > until:
            break
        time.sleep(_LOOK_EVERY_SECONDS)
    if request.number is not None:
        return 128 + request.number
    code = code or next((worker.returncode for worker in workers if worker.returncode), 0)
    return 128 - code if code < 0 else code


def _how(code: int) -> str:
    """How a worker ended. A worker that failed has printed the reason itself."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """Kill the worker and the processes that it started, including those that outlived it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _stop_without(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(_LOOK_FOR_STARTER_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)
    os.killpg(os.getpgid(0), signal.SIGKILL)
