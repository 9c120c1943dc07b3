"""vLLM as a child process: starts it, waits until it is ready, makes one test request for features, and stops it.

Knows processes and the test request; vllm_command.py makes the command.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from attrs import define, field

from deepspec_core.errors import ConfigError, StageError
from deepspec_core.progress import LOG_EVERY_SECONDS, duration
from deepspec_core.servers.vllm_command import Served, command, variables
from deepspec_core.stopping import StopRequest

_LAST_LINES: Final = 20
# An exception as a traceback ends: by itself, behind the name of a process, or behind the head of an ERROR line.
_ERROR: Final = re.compile(r"^(?:\([^)]*\) )?(?:ERROR .*?\] )?([\w.]*(?:Error|Exception): .*)")
_COLOUR: Final = re.compile(r"\x1b\[[\d;]*m")
_LOOK_EVERY_SECONDS: Final = 0.5
_SECONDS_TO_END: Final = 30.0
_ANSWER_SECONDS: Final = 300.0
_SECONDS_TO_READ: Final = 10.0
_FIRST_PROMPT: Final = (0, 1, 2)


def executable(named: str) -> str:
    """vLLM's program. ConfigError where there is none of this name."""
    found = shutil.which(named)
    if found is None:
        raise ConfigError(
            "vLLM's program is not found",
            where="--vllm",
            found=named,
            expected="the path of `vllm`, or its name where the shell finds it",
            fix="Install vLLM in an environment of its own, and name it: --vllm ENVIRONMENT/bin/vllm"
            " (docs/target-elsewhere.md, Starting the engine).",
        )
    return str(Path(found).absolute())


def require_free(served: Served) -> None:
    """ConfigError where the port cannot be listened on, known before the engine has read its weights."""
    family = socket.AF_INET6 if ":" in served.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((served.host.strip("[]"), served.port))
        except OSError as error:
            raise ConfigError(
                "The server cannot listen on this address",
                where=f"--host {served.host} --port {served.port}",
                found=error.strerror or str(error),
                fix="Give another --port, or stop the program that listens on it.",
            ) from error


@define
class Engine:
    """vLLM's process. `say` gets its state, a line at a time; what the engine writes goes to standard error."""

    served: Served
    say: Callable[[str], None]
    quiet: bool = False
    _last: deque[str] = field(factory=lambda: deque(maxlen=_LAST_LINES), init=False)
    _first_error: str | None = field(default=None, init=False)
    _reader: threading.Thread | None = field(default=None, init=False)

    def run(self) -> int:
        """Starts it, says when it answers, and stays until it ends or a signal asks to stop; the exit code.

        StageError where it ends before it answers, or does not give features.
        """
        with StopRequest() as request, _a_closed_terminal_asks_to_stop():
            process = self._start()
            self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
            self._reader.start()
            try:
                if self._answers(process, request):
                    self._ask_once(process)
                    self._say_ready()
                while process.poll() is None and not request.asked:
                    time.sleep(_LOOK_EVERY_SECONDS)
            finally:
                _end(process)
                self._reader.join(_SECONDS_TO_END)
        if request.number is not None:
            self.say("vLLM has ended.")
            return 128 + request.number
        raise self._ended(process.returncode, "vLLM ended by itself")

    def _start(self) -> subprocess.Popen[str]:
        program = Path(self.served.executable)
        environment = {**os.environ, **variables(self.served, os.environ)}
        # As its environment's own activation does: vLLM starts programs of it by name.
        environment["PATH"] = f"{program.parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
        # A session of its own: Ctrl-C of the terminal reaches it through this process, once.
        return subprocess.Popen(
            command(self.served),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._last.append(line.rstrip())
            if self._first_error is None and (error := _ERROR.match(_COLOUR.sub("", line))):
                self._first_error = error[1].strip()
            if not self.quiet:
                with suppress(OSError, ValueError):
                    sys.stderr.write(line)
                    sys.stderr.flush()

    def _answers(self, process: subprocess.Popen[str], request: StopRequest) -> bool:
        """Waits until it does. False where a signal asked to stop first."""
        began = told = time.monotonic()
        while not request.asked:
            if process.poll() is not None:
                raise self._ended(process.returncode, "vLLM ended before it answered")
            with suppress(urllib.error.URLError, OSError):
                _get(f"{self.served.address}/health", None, 5.0)
                return True
            if time.monotonic() - told > LOG_EVERY_SECONDS:
                told = time.monotonic()
                self.say(f"vLLM is starting, {duration(told - began)}")
            time.sleep(_LOOK_EVERY_SECONDS)
        return False

    def _ask_once(self, process: subprocess.Popen[str]) -> None:
        """A test request of three tokens, which checks that a file is written and holds the requested states."""
        body = {
            "model": self.served.names[0],
            "prompt": list(_FIRST_PROMPT),
            "max_tokens": 1,
            "temperature": 0.0,
            "kv_transfer_params": {"file": f"serve-{os.getpid()}-{time.time_ns()}"},
        }
        try:
            answer = json.loads(_get(f"{self.served.address}/v1/completions", body, _ANSWER_SECONDS))
        except (OSError, ValueError) as error:
            if process.poll() is not None:
                raise self._ended(process.returncode, "vLLM ended at its first request") from error
            raise StageError(
                "vLLM does not answer the first request", where=self.served.address, found=_said(error), fix=_LAYERS_FIX
            ) from error
        said = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
        path = said.get("hidden_states_path") if isinstance(said, dict) else None
        if not isinstance(path, str):
            raise StageError(
                "vLLM writes no features", where=self.served.address, found=str(said)[:400], fix=_LAYERS_FIX
            )
        self._check_file(Path(path))

    def _check_file(self, path: Path) -> None:
        """StageError if the first file does not hold what was requested. The file is removed."""
        from safetensors import SafetensorError, safe_open

        expected = (len(_FIRST_PROMPT), len(self.served.layer_ids))
        lock = path.with_name(f"{path.name}.lock")
        try:
            with lock.open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH)  # held by the engine until the file is there
            with safe_open(path, framework="np") as file:
                shape, metadata = tuple(file.get_slice("hidden_states").get_shape()), file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise StageError(
                "The first file of features from vLLM cannot be read",
                where=path,
                found=str(error),
                fix="Read vLLM's output, and check the free space of the exchange folder.",
            ) from error
        finally:
            for one in (path, lock):
                one.unlink(missing_ok=True)
        if shape[:2] != expected or metadata.get("layers") != json.dumps(self.served.layer_ids):
            raise StageError(
                "vLLM writes other hidden states than were requested",
                where=path,
                found=f"{list(shape)}, layers {metadata.get('layers')}",
                expected=f"{list(expected)} and the hidden size, layers {self.served.layer_ids}",
                fix=_LAYERS_FIX,
            )

    def _say_ready(self) -> None:
        served = self.served
        self.say(f"vLLM answers at {served.address}/v1 and gives features; Ctrl-C ends it. In the run file:")
        self.say(f'  servers = ["{served.address_elsewhere}/v1"]')
        self.say(f"  exchange = {json.dumps(str(served.exchange))}")
        if os.environ.get("VLLM_API_KEY"):
            self.say('  api_key_env = "VLLM_API_KEY"')

    def _ended(self, code: int, problem: str) -> StageError:
        if self._reader is not None:
            self._reader.join(_SECONDS_TO_READ)  # what it wrote last may not have been read yet
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = "\n    ".join(self._last) if self._last else "nothing"
        first = "" if self._first_error is None else f"; its first error was: {self._first_error}"
        found = f"{how}{first}; the end of its output:\n    {lines}"
        return StageError(problem, where=self.served.executable, found=found)


@contextmanager
def _a_closed_terminal_asks_to_stop() -> Iterator[None]:
    """Inside the block SIGHUP is SIGTERM, unless it is ignored, as nohup asks. Otherwise the engine would be left."""
    before = signal.getsignal(signal.SIGHUP)
    own = threading.current_thread() is threading.main_thread() and before != signal.SIG_IGN
    if own:
        signal.signal(signal.SIGHUP, lambda _number, _frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGHUP, before)


_LAYERS_FIX: Final = "Look at what it wrote; not every model of vLLM gives the states of its layers."


def _get(url: str, body: Mapping[str, Any] | None, seconds: float) -> str:
    """The answer, asked without any proxy: the engine is this machine's."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):  # vLLM asks for it then
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data=data, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=seconds) as answer:
        return str(answer.read().decode())


def _said(error: Exception) -> str:
    """What a server said with its refusal, or what went wrong."""
    if isinstance(error, urllib.error.HTTPError):
        with suppress(OSError):
            return f"{error.code} {' '.join(error.read(2000).decode(errors='replace').split())[:400]}"
    return f"{type(error).__name__}: {error}"


def _end(process: subprocess.Popen[str]) -> None:
    """Asks it to end, and kills it and what it started where that takes too long."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
