"""One run as several processes: the first does every stage, the others join it where there is work for all: training.

The others wait by looking at stage records on the shared disk: stages before training may take days, longer than any
collective may wait. Knows the launcher's environment (torchrun, accelerate launch, local_workers.py); not what a stage
does.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deepspec_core.pipeline.fingerprint import read_record

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.5


def rank() -> int:
    """This process among those of the run, 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return count() > 1


def visible_devices() -> int:
    """Accelerators this process sees."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def device() -> torch.device:
    """This worker's accelerator, else the CPU; joins the other workers the first time it is asked."""
    from accelerate import PartialState

    # accelerate joins workers without an accelerator only where it is told that the CPU is meant.
    own: torch.device = PartialState(cpu=visible_devices() == 0).device
    return own


def meet() -> None:
    """Return when every worker is here."""
    if launched():
        from accelerate import PartialState

        device()
        PartialState().wait_for_everyone()


def part() -> None:
    """Leave the other workers in good order: a process group that outlives its process may abort it."""
    if launched():
        from accelerate import PartialState

        PartialState().destroy_process_group()


def wait_for(folder: Path) -> None:
    """Return when the first worker has completed the stage of `folder`. A worker that fails ends all of them."""
    while (record := read_record(folder)) is None or not record.complete:
        time.sleep(POLL_SECONDS)
