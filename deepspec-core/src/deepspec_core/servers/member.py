"""A running request and a server, as a farm (servers/farm.py) stores them. Knows no HTTP and no scheduling."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from attrs import define, field

from deepspec_core.servers.connection import Connection, Refusal
from deepspec_core.servers.level import Level


@define(eq=False)
class Job:
    """A request under way, with its attempts so far."""

    request: Any
    attempts: int = 0
    pauses: int = 0
    wait: float = 0.0
    last: Member | None = None
    refused_by: Member | None = None
    refusal: Refusal | None = None


@define(eq=False)
class Member:
    """A server. `served` is None while it must be probed before it is used; `out` is true once this was reported.

    why: Why it could not be used or did not answer, the last time. doubts: The number of requests that it refused and
    that no other server has answered or refused yet. heard: The time when it last answered, or was last asked after a
    pause.
    """

    connection: Connection
    level: Level
    served: Any = None
    out: bool = False
    why: str = "no answer"
    jobs: dict[asyncio.Task[Any], Job] = field(factory=dict)
    strikes: int = 0
    answers: int = 0
    faults: int = 0
    doubts: int = 0
    remarks: Counter[str] = field(factory=Counter)
    heard: float = 0.0

    @property
    def room(self) -> int:
        return 0 if self.served is None else self.level.value - len(self.jobs)
