"""The peak memory of a piece of work: allocated on an accelerator, or resident in this process on a CPU.

This file knows the counters of PyTorch and of Linux. It does not know what the work is.
"""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK_ONLY = "5"  # written to clear_refs, this resets the peak resident size


def forget_peak(device: torch.device) -> None:
    """Reset the peak. On a CPU whose system does not allow it, peaks remain those of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):
            _RESET.write_text(_PEAK_ONLY)


def peak_bytes(device: torch.device) -> int | None:
    """The peak in bytes since forget_peak; None on devices that do not count bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu":
        return None
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE):
            return int(found.group(1)) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
