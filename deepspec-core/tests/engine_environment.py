"""Virtual environments with other projects' packages, for slow tests that ask them what they make of an export.

Each is built once and kept under the user's cache folder. A test is skipped, with the reason, where its packages cannot
be had. Knows pip; not what is installed for which test.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

# Read when tests are collected: a fixture gives the test run a cache folder of its own afterwards.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepspec" / "test-environments"
_READY = "ready"
_ENOUGH_BYTES = 12 << 30


def environment(
    name: str,
    *requirements: str,
    alone: Sequence[str] = (),
    without: Sequence[str] = (),
    known_as: str | None = None,
    module: str,
) -> Path:
    """The interpreter of an environment that has these packages, built where it is not there.

    `alone`: packages that are installed without what they depend on. `without`: packages that are removed again.
    `known_as`: another name and version, such as "vllm 0.32.0", under which a package looks itself up. `module`: what
    must import. Skips the test where pip fails.
    """
    key = hashlib.sha256(
        "\n".join([sys.version, *requirements, *alone, *without, known_as or "", module]).encode()
    ).hexdigest()[:12]
    folder = _CACHE / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _READY).exists():
            if shutil.disk_usage(folder).free < _ENOUGH_BYTES:
                pytest.skip(f"no room for an environment with {', '.join(requirements)}")
            shutil.rmtree(folder / "venv", ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
            _pip(folder, "install", *requirements)
            if alone:
                _pip(folder, "install", "--no-deps", *alone)
            if without:
                _pip(folder, "uninstall", "--yes", *without)
            if known_as is not None:
                _name(folder, *known_as.split())
            _ask(folder, module)
            (folder / _READY).touch()
    return folder / "venv" / "bin" / "python"


def run(interpreter: Path, script: str, *arguments: str | Path, seconds: int = 600) -> None:
    """Run a script with it, offline, and fail the test with what it wrote where it fails."""
    apart = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [interpreter, "-c", script, *arguments],
        env={**os.environ, **apart},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{interpreter.parents[2].name}: {done.stderr[-4000:]}", pytrace=False)


def _pip(folder: Path, *arguments: str) -> None:
    command = [folder / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        pytest.skip(f"packages cannot be had: pip {' '.join(arguments)}: {lines[-1]}")


def _name(folder: Path, name: str, version: str) -> None:
    (packages,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _ask(folder: Path, module: str) -> None:
    command = [folder / "venv" / "bin" / "python", "-c", f"import {module}"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{module} does not import on this machine: {done.stderr.strip().splitlines()[-1]}")
