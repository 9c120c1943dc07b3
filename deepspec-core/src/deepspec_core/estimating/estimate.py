"""What an estimate says, and as what it is written: parts by name, in bytes and floating-point operations.

Knows the parts and how they add up; not where figures come from. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import asdict, frozen


@frozen(kw_only=True)
class Memory:
    """Bytes of one training process, on its device. `held`: all through a step, by what they are; `phases`: the most
    beyond that while a part of the step runs. The peak is all that is held and the largest phase."""

    held: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def peak_phase(self) -> str:
        """The phase in which most is alive."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak_bytes(self) -> int:
        """The most bytes at once."""
        return sum(self.held.values()) + self.phases[self.peak_phase]


@frozen(kw_only=True)
class CacheSize:
    """Of the feature cache. `most_tokens` and `most_bytes` are None where the run file limits no conversations.

    kept_with_answers: Whether features come with answers, and are on disk twice until the cache is whole.
    """

    bytes_per_token: int
    most_tokens: int | None
    most_bytes: int | None
    kept_with_answers: bool = False


@frozen(kw_only=True)
class MicroBatch:
    """`sequences` of `tokens_per_sequence` tokens each, what they give to predict, and the distinct positions it is
    compared with."""

    sequences: int
    tokens_per_sequence: int
    rows: int
    target_positions: int


@frozen(kw_only=True)
class Estimate:
    """Of a run's training on `processes` devices. `flops`: of one optimizer step of all of them, by part.

    `not_counted`: what memory or flops leave out although there may be much of it, in words.
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
