"""Accidents of files and their writers: a flipped bit, a truncated file, a killed process.

This file knows folders and processes. It does not know what the files hold.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from deepspec_core.testing.conformance import require


def damaged(folder: Path) -> Iterator[tuple[str, bool]]:
    """Damage each file that is not empty, in three ways one after the other. The file is restored after each.

    Yields a description of the damage, and whether the file's size has changed.
    """
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        content = path.read_bytes()
        if not content:
            continue
        # Zeros are often padding that no reader looks at.
        said = np.flatnonzero(np.frombuffer(content, dtype=np.uint8))
        flipped = bytearray(content)
        flipped[said[len(said) // 2] if len(said) else 0] ^= 1
        half = content[: len(content) // 2]
        changes = {"a bit has flipped in": bytes(flipped), "half is gone of": half, "nothing is left of": b""}
        for what, changed in changes.items():
            _replace(path, changed)
            try:
                yield f"{what} {path.relative_to(folder)}", len(changed) < len(content)
            finally:
                _replace(path, content)


def killed_after(work: Callable[[], object]) -> None:
    """Do the work in a process that is then killed. No file is closed, and data that was not written yet is lost."""
    child = os.fork()
    if not child:
        # The child must never return into this process's code, whatever happens in it.
        try:
            torch.set_num_threads(1)
            kept = work()
            os.kill(os.getpid(), signal.SIGKILL)
            del kept
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    require(code == -signal.SIGKILL, f"an error before the process was killed: its exit code is {code}")


def _replace(path: Path, content: bytes) -> None:
    # A new file, because a reader may still have the old one open or mapped, and a mapped file must keep its size.
    with suppress(FileNotFoundError):
        path.unlink()
    path.write_bytes(content)
