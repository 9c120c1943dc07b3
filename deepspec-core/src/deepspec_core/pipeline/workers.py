"""One run as several processes: this process's rank, how it finds the others, and how all begin and end together.

Every worker takes part in every stage that can be shared; workers exchange messages through crew.py. Knows the
launcher's environment (torchrun, accelerate launch, local_workers.py); does not know what a stage does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deepspec_core.crew import ALONE, Crew
from deepspec_core.locks import Lock, lock
from deepspec_core.pipeline.fingerprint import read_record

if TYPE_CHECKING:
    import torch

    from deepspec_core.crew import Store

POLL_SECONDS = 0.5
_CONNECT: Final = timedelta(seconds=60)
# A launcher that keeps the store says so. Else the first worker keeps it, and the others hear no more once it is gone.
_STORE_OF_LAUNCHER: Final = "TORCHELASTIC_USE_AGENT_STORE"
_SECONDS_TO_HEAR: Final = 3.0

_LOCK: Final = ".workers.lock"

_crew: Crew = ALONE


def rank() -> int:
    """The number of this process among those of the run; 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    """How many of the run's processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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


def crew() -> Crew:
    """The workers that are together now; this process alone outside of `together`."""
    return _crew


@contextmanager
def together() -> Iterator[Crew]:
    """Inside the block the run's workers hear of each other. An error of one ends all of them.

    They leave in good order: a process group that outlives its process may abort it.
    """
    global _crew
    if not launched():
        yield ALONE
        return
    from accelerate import PartialState

    device()
    _crew = Crew(rank=rank(), count=count(), store=_connection())
    watch = _crew.watch(_connection())
    try:
        yield _crew
        _crew.gather("end", True)
        watch.end()
        # The store may be the first worker's own: it leaves last.
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
    except BaseException as error:
        cause = _crew.cause_of(error)
        _crew.fail(cause)
        if rank() == 0 and os.environ.get(_STORE_OF_LAUNCHER) != "True":
            time.sleep(_SECONDS_TO_HEAR)
        if cause is error:
            raise
        raise cause from error
    finally:
        watch.end()
        _crew = ALONE


def lock_for_workers(folder: Path) -> None:
    """In the first worker: raise StageError if workers of an earlier run may still write there."""
    if launched() or (folder / _LOCK).exists():
        _held_by_workers(folder, shared=False).release()


def held_by_worker(folder: Path) -> Lock:
    """In the others: a lock that says that one of them is still there."""
    return _held_by_workers(folder, shared=True)


def _held_by_workers(folder: Path, *, shared: bool) -> Lock:
    return lock(
        folder,
        name=_LOCK,
        shared=shared,
        problem="Workers of an earlier run have not ended yet",
        fix="Wait a minute, or stop them.",
    )


def _connection() -> Store:
    """To the store at which the launcher, or the first worker, lets the workers meet."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=_CONNECT,
    )
    # torchrun's store outlives workers that it starts again.
    return PrefixStore(f"deepspec/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def wait_for(folder: Path) -> None:
    """Return when the first worker has completed the stage of `folder`. Raises StageError if another worker fails."""
    while (record := read_record(folder)) is None or not record.complete:
        _crew.check()
        time.sleep(POLL_SECONDS)
