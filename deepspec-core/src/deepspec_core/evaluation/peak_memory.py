"""The most memory that a piece of work took: allocated on an accelerator, or resident in this process on a CPU.

Knows PyTorch's counters and Linux's. Does not know what the work is.
"""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK_ONLY = "5"  # what clear_refs takes to forget the greatest resident size


def forget_peak(device: torch.device) -> None:
    """Begin anew. On a CPU where the system does not allow it, peaks remain those of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):
            _RESET.write_text(_PEAK_ONLY)


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes at once since forget_peak; None on devices that do not count them."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu":
        return None
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE):
            return int(found.group(1)) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
