"""A farm's work of answering prompts: a completion for each request, in the dialect that each server speaks.

Knows requests, dialects and answers. Does not know farms.
"""

from __future__ import annotations

from typing import Any, Final

from attrs import frozen

from deepspec_core.data.answering import Answer
from deepspec_core.decoding.engine import Request
from deepspec_core.servers.connection import Connection
from deepspec_core.servers.dialects import Dialect
from deepspec_core.servers.probe import DIALECTS, Served, probe
from deepspec_core.servers.reading import read
from deepspec_core.servers.wanted import Wanted

_MISMATCHED: Final = "with other token counts than the server's"


@frozen
class Answering:
    """A servers.work.Work: completions of the wanted requests, in the first dialect that a server accepts."""

    wanted: Wanted
    dialects: tuple[Dialect, ...] = DIALECTS

    async def probe(self, connection: Connection) -> Served:
        """As of Work."""
        return await probe(connection, self.wanted, dialects=self.dialects)

    async def ask(self, connection: Connection, served: Served, request: Request) -> Answer:
        """As of Work."""
        body = self.body(served, request)
        sent = await connection.complete(body, seconds=self.wanted.timeout, path=served.dialect.path)
        content = served.dialect.in_form(sent, body)
        return read(content, request, self.wanted, model=served.model)

    def body(self, served: Served, request: Request) -> dict[str, Any]:
        """What is sent for a request. Refusal where the prompt cannot be said."""
        return served.dialect.body(
            self.wanted,
            model=served.model,
            prompt_ids=request.prompt_ids,
            limit=self.wanted.limit(request.prompt_ids),
            seed=request.seed,
        )

    def tokens(self, answer: Answer) -> int:
        """The tokens that were generated."""
        return len(answer.completion.output_ids)

    def describe(self, served: Served) -> str:
        """As of Work."""
        exact = "it returns token ids" if served.exact else "its texts are tokenised here"
        return f"{served.model}: {served.dialect.name}, {exact}"

    def remark(self, answer: Answer) -> str | None:
        """Answers whose ids were made from text, and are not as many as the server counted."""
        return _MISMATCHED if answer.mismatched else None
