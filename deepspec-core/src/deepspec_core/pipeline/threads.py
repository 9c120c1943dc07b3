"""How many threads each stage computes with on the CPU, and how waiting threads behave.

The number of threads follows from the size of one step of the stage, because several threads on a small product mostly
wait for each other. The rule reads only the run file and the target's sizes, so a resumed run chooses the same number.
`run.threads` overrides it. Imports nothing heavy at the top, because the environment has to be set before PyTorch is
loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from deepspec_core.contracts.target import TargetArchitecture
    from deepspec_core.pipeline.run import Run

# Measured with dense transformers on two cores: a second thread makes a forward pass of 0.04 GFLOP 1.02 times as fast,
# one of 0.34 GFLOP 1.16 times, one of 0.95 GFLOP 1.31 times and one of 17 GFLOP 1.84 times.
# A step smaller than WORTH_SHARING gets one thread; a larger one gets a thread for each OPERATIONS_A_THREAD.
WORTH_SHARING = 3.5e8
OPERATIONS_A_THREAD = 1e8
# Turns of libgomp's waiting loop before a thread sleeps: about a tenth of a millisecond. With its default of 300,000, a
# waiting thread keeps a core that others need: two trainings on two cores then ran 34 times slower than one alone.
SPIN_COUNT = "3000"
_LIMIT = "OMP_NUM_THREADS"
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def let_waiting_threads_sleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell OpenMP, before PyTorch loads it, that threads sleep soon after they begin to wait for others.

    Variables that the user has set in the environment stay as they are.
    """
    if not any(name in environment for name in _WAITING):
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT


def available(quota: Path = _CPU_QUOTA) -> int:
    """The number of threads that PyTorch would use by itself, or the container's CPU quota if that is less."""
    import torch

    try:
        limit, period = quota.read_text(encoding="ascii").split()
        cores = math.ceil(int(limit) / int(period))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return torch.get_num_threads()
    return max(1, min(cores, torch.get_num_threads()))


def threads_for(operations: float, most: int) -> int:
    """The number of threads for steps of that many floating-point operations, between 1 and `most`."""
    return 1 if operations < WORTH_SHARING else min(most, int(operations / OPERATIONS_A_THREAD))


def operations_of_step(run: Run, stage: str) -> float:
    """About how many operations one step of a stage takes: one forward pass, or one micro-batch of training."""
    file, of_token = run.file, 2 * _multiplications(run.target.architecture)
    if stage == "regenerate":
        return of_token * file.regenerate.batch_size
    if stage == "evaluate":
        # A round verifies a handful of tokens in each sequence.
        return of_token * max(file.evaluate.batch_sizes)
    if stage == "export":
        return 0.0  # it copies weights
    if stage == "cache":
        return of_token * file.cache.batch_size * run.data.max_length
    assert stage == "train", stage
    # The forward and backward pass of a draft of one target layer, over the sequences of a micro-batch.
    share = 1 / run.target.architecture.num_layers
    return 3 * share * of_token * file.train.micro_batch_size * run.data.max_length


def for_decoding(architecture: TargetArchitecture, device: torch.device, *, batch_size: int) -> int:
    """The number of threads for decoding so many sequences at once."""
    if device.type != "cpu":
        return available()
    return threads_for(2 * _multiplications(architecture) * batch_size, available())


def _multiplications(architecture: TargetArchitecture) -> float:
    """Multiplications for one token: 12 H x H in each decoder layer, as is usual, and the vocabulary head's."""
    size = architecture.hidden_size
    return 12.0 * size * size * architecture.num_layers + size * architecture.vocab_size


def choose(run: Run, stages: Sequence[str], *, processes: int = 1) -> dict[str, int]:
    """The threads of each stage, for one of `processes` on this machine. On an accelerator, PyTorch's own number."""
    if not stages:
        return {}
    # A number that the user set holds for every process; otherwise they share the cores.
    most = available() if _LIMIT in os.environ else max(1, available() // processes)
    if run.file.run.threads is not None:
        return dict.fromkeys(stages, run.file.run.threads)
    if run.target.device.type != "cpu":
        return dict.fromkeys(stages, most)
    return {stage: threads_for(operations_of_step(run, stage), most) for stage in stages}


def in_words(chosen: dict[str, int], *, given: bool, device: str = "cpu") -> str:
    """The choice and its reason as one line, for the beginning of a run's output."""
    alike = len(set(chosen.values())) == 1
    listed = ", ".join(f"{stage} {count}" for stage, count in chosen.items())
    number = str(next(iter(chosen.values()))) if alike else listed
    limit = os.environ.get(_LIMIT)
    bound = "" if limit is None else f", at most the {limit} of {_LIMIT}"
    if given:
        return f"threads: {number} (as run.threads says)"
    if device != "cpu":
        return f"threads: {number} (PyTorch's own number, since the run computes on {device}; run.threads sets another)"
    return f"threads: {number} (by the size of a stage's steps{bound}; run.threads sets one number for all)"


def announce(run: Run, stages: Sequence[str], say: Callable[[str], None], *, processes: int = 1) -> None:
    """Say how many threads the stages that will run have, and why."""
    chosen = choose(run, stages, processes=processes)
    if chosen:
        say(in_words(chosen, given=run.file.run.threads is not None, device=run.target.device.type))


@contextmanager
def using(count: int) -> Iterator[None]:
    """Compute with `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
