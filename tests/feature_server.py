"""`deepspec serve` with vLLM as a process on loopback, for slow tests, and the features of one text asked of it.

Knows how it is started, killed and ended; not what is tested with it.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from engine_process import vllm
from safetensors import safe_open
from torch import Tensor

_START_SECONDS = 900


class FeatureServer:
    """An engine behind `deepspec serve`, at one port. `log`: what both write."""

    def __init__(self, place: str | Path, exchange: Path, log: Path, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.exchange, self.log = f"http://127.0.0.1:{self.port}", exchange, log
        program = str(vllm().with_name("vllm"))
        own = ["--exchange", str(exchange), "--port", str(self.port), "--vllm", program]
        self._command = [sys.executable, "-m", "deepspec_core", "serve", str(place), *own, *words]

    def begin(self) -> None:
        """Starts it."""
        settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        settings["XDG_CACHE_HOME"] = str(self.log.parent / "cache")
        self._before = self.log.read_bytes().count(b"vLLM answers at") if self.log.exists() else 0
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self._command, env={**os.environ, **settings}, stdout=out, stderr=subprocess.STDOUT
            )

    def wait(self) -> None:
        """Returns when it says that it answers; fails the test where it ends before."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            if self.log.read_bytes().count(b"vLLM answers at") > self._before:
                return
            time.sleep(0.5)
        self.stop()
        pytest.fail("it does not serve:\n" + self.log.read_text(errors="replace")[-3000:], pytrace=False)

    def kill(self) -> None:
        """The engine at once, as by a machine that fails; the command that watches it then ends by itself."""
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        for child in map(int, children.stdout.split()):
            os.killpg(child, signal.SIGKILL)
        assert self.process.wait(60) == 2

    def stop(self) -> int:
        """As by Ctrl-C; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(90)

    def post(self, ids: Sequence[int], *, seconds: float = 300, **more: Any) -> dict[str, Any]:
        """The answer to a request of one token."""
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, **more}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return dict(json.loads(answer.read()))


@frozen(eq=False)
class Written:
    """An answer's file: states [T, K, H], their scales [T, K] or None, token ids [T]."""

    states: Tensor
    scales: Tensor | None
    token_ids: list[int]
    metadata: dict[str, str]
    bytes: int


def taken(answer: dict[str, Any]) -> Written:
    """The file that an answer names, read and removed."""
    path = Path(answer["kv_transfer_params"]["hidden_states_path"])
    lock = path.with_name(path.name + ".lock")
    with lock.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    size = path.stat().st_size
    path.unlink()
    lock.unlink()
    ids = tensors["token_ids"].tolist()
    return Written(tensors["hidden_states"], tensors.get("hidden_states_scale"), ids, metadata, size)


@contextmanager
def serving(place: str | Path, exchange: Path, log: Path, *words: str) -> Iterator[FeatureServer]:
    """A server that answers. It is ended in the end, and its exit code is that of Ctrl-C."""
    server = FeatureServer(place, exchange, log, *words)
    server.begin()
    server.wait()
    try:
        yield server
    finally:
        code = server.stop()
    assert code == 130, log.read_text(errors="replace")[-3000:]
