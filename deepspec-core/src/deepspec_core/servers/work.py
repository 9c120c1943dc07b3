"""The contract of a farm's work: which request a server gets, and how its answer is received.

Knows the members that servers/farm.py needs. Does not know what a request or an answer is.
"""

from __future__ import annotations

from typing import Any, Protocol

from deepspec_core.servers.connection import Connection
from deepspec_core.servers.wanted import Wanted


class Work(Protocol):
    """One kind of request. A request has an `id`, which a farm never reads but to say it.

    A Fault (servers/connection.py) from `probe` or `ask` is the server's: it is asked again, or another one is. A
    Refusal from `ask` is the request's: it stays unanswered, unless another server answers it.
    """

    @property
    def wanted(self) -> Wanted:
        """How messages call the settings, the servers' key, seconds for one answer, and requests at once."""
        ...

    async def probe(self, connection: Connection) -> Any:
        """How the server is asked. NotServed (servers/probe.py) where it cannot be used, Fault where it is not
        ready."""
        ...

    async def ask(self, connection: Connection, served: Any, request: Any) -> Any:
        """The answer to a request, by what `probe` returned. Fault or Refusal where there is none."""
        ...

    def tokens(self, answer: Any) -> int:
        """How much work an answer was. By tokens a second a farm finds out how many requests a server takes at once."""
        ...

    def describe(self, served: Any) -> str:
        """What `probe` found, for the log."""
        ...

    def remark(self, answer: Any) -> str | None:
        """What is to be counted of an answer and said in the end; None: nothing."""
        ...
