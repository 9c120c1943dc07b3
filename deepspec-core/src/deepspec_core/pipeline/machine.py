"""The facts that determine how fast this process computes: device, threads and versions. Does not know what it
computes.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

from deepspec_core import __version__


def machine_of(device: torch.device) -> dict[str, Any]:
    """The device's name, the number of threads, and the versions of Python, of libraries and of core."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspec-core": __version__,
    }
