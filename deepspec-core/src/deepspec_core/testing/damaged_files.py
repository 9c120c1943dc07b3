"""What happens to files and their writers: a bit that flips, a file that is cut, a process that is killed.

Knows folders and processes. Does not know what the files hold.
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
    """Damage each file that is not empty, in three ways one after the other. It is whole again after each.

    Gives what has been done, in words, and whether the file has another size now.
    """
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        content = path.read_bytes()
        if not content:
            continue
        # Zeros are often room that nobody reads.
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
    """Do the work in a process that is killed at its end: nothing is closed, and what was not written yet is lost."""
    child = os.fork()
    if not child:
        # Nothing of this process may go on in the child, whatever happens there.
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
    # A new file: who still has the old one open keeps it, and a mapping of it stays as long as it was.
    with suppress(FileNotFoundError):
        path.unlink()
    path.write_bytes(content)
