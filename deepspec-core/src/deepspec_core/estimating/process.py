"""What a training process takes on the CPU beside its tensors: libraries, what computing loads, what is freed and kept.

The first is read from the system; the others are figures, measured as said here. Knows processes; no tensors.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Final

# The C library (glibc) takes blocks of up to this size from a heap that gives back its end only; larger ones come from
# the system, and go back to it.
HEAP_BLOCK: Final = 32 << 20
# What is free in that heap, between blocks that are not, when memory peaks. Measured over several steps of three kinds
# of drafts at 0.5 to 3.5 GB: as much as a step has there at most, up to so much,
_KEPT_AT_MOST: Final = 100 << 20
# and a share of all it has there, the more where gradients outlive a micro-batch amid its blocks.
_KEPT, _KEPT_ACCUMULATING = 0.3, 0.55
# Code of kernels, read from disk when first called, and their packing buffers. Measured on the same: 40 to 70 MB.
KERNEL_BYTES: Final = 50 << 20


def resident_bytes() -> int:
    """What this process has in memory now, libraries included; where the system does not say, the most it ever had."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def kept_bytes(small: int, *, accumulates: bool) -> int:
    """What the C library keeps, freed, beside a step with at most `small` bytes in blocks of up to HEAP_BLOCK."""
    if platform.libc_ver()[0] != "glibc":
        return 0
    return min(small, _KEPT_AT_MOST) + int(small * (_KEPT_ACCUMULATING if accumulates else _KEPT))
