"""The contents of an estimate, and its JSON: parts by name, in bytes and floating-point operations.

Knows the parts and how they add up; does not know where figures come from. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import asdict, frozen


@frozen(kw_only=True)
class Memory:
    """Bytes of one training process on its device.

    held: Bytes held during the whole step, by what they hold.
    phases: The most bytes in addition to `held` while a part of the step runs, by part. The peak is the sum of `held`
        and the largest phase.
    """

    held: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def peak_phase(self) -> str:
        """The phase with the most bytes."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak_bytes(self) -> int:
        """The most bytes at once."""
        return sum(self.held.values()) + self.phases[self.peak_phase]


@frozen(kw_only=True)
class CacheSize:
    """The size of the feature cache. `most_tokens` and `most_bytes` are None if the run file does not limit the number
    of conversations.

    kept_with_answers: Whether features come with answers. They are then on disk twice until the cache is complete.
    """

    bytes_per_token: int
    most_tokens: int | None
    most_bytes: int | None
    kept_with_answers: bool = False


@frozen(kw_only=True)
class MicroBatch:
    """`sequences` of `tokens_per_sequence` tokens each, the predictions in them (`rows`), and the number of distinct
    positions of the target with which the predictions are compared."""

    sequences: int
    tokens_per_sequence: int
    rows: int
    target_positions: int


@frozen(kw_only=True)
class Estimate:
    """The estimate of a run's training on `processes` devices.

    flops: Operations of one optimizer step of all processes together, by part.
    not_counted: Sentences about parts that `memory` or `flops` leave out although they may be large.
    """

    device: str
    processes: int
    micro_batch: MicroBatch
    micro_batches_per_step: int
    memory: Memory
    cache: CacheSize | None
    flops: Mapping[str, int]
    not_counted: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types, under stable keys."""
        memory = self.memory
        return {
            "device": self.device,
            "processes": self.processes,
            "micro_batch": asdict(self.micro_batch),
            "micro_batches_per_step": self.micro_batches_per_step,
            "memory": {
                "peak_bytes": memory.peak_bytes,
                "peak_phase": memory.peak_phase,
                "held_bytes": dict(memory.held),
                "phase_bytes": dict(memory.phases),
            },
            "cache": None if self.cache is None else asdict(self.cache),
            "flops_per_step": {"total": sum(self.flops.values()), **self.flops},
            "not_counted": list(self.not_counted),
        }
