"""What is asked of one server: an answer, and the hidden states of the text that it ends. It is a farm's work.

The target reads a conversation once: the server writes what it computed while it answered. An answer counts also where
its states do not: then they are asked for later, as of any other text. Knows answers and the protocol of features; not
which conversations are answered, nor where features go.

Legend: T tokens of a prompt and its answer.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from attrs import evolve, frozen

from deepspec_core.data.answering import Answer, Turn
from deepspec_core.features.served.answer_place import BadAnswer
from deepspec_core.features.served.asking import FeatureWork
from deepspec_core.features.served.asking import Served as ServedFeatures
from deepspec_core.servers.answering import Answering
from deepspec_core.servers.connection import Connection, Fault, Kind, Refusal
from deepspec_core.servers.dialects import TokenIds
from deepspec_core.servers.probe import NotServed
from deepspec_core.servers.probe import Served as ServedAnswers
from deepspec_core.servers.reading import read
from deepspec_core.servers.wanted import Wanted

# A request that is answered and no more leaves no file.
WITHOUT_FILES: Final = TokenIds(more={"kv_transfer_params": {"write": False}})


@frozen(kw_only=True, eq=False)
class Served:
    """How a server is asked for answers, and for features."""

    answers: ServedAnswers
    features: ServedFeatures


@frozen(kw_only=True, eq=False)
class AnsweringWithFeatures:
    """A servers.work.Work: answers to data.answering.Turn, the last of a conversation with features."""

    answering: Answering
    features: FeatureWork

    @property
    def wanted(self) -> Wanted:
        """As of Work."""
        return self.answering.wanted

    async def probe(self, connection: Connection) -> Served:
        """As of Work. A server has to return token ids: features belong to them."""
        answers = await self.answering.probe(connection)
        if not answers.exact:
            raise NotServed(
                "A server returns no token ids, so it is not known what its features belong to",
                where=f"{self.wanted.called.servers}: {connection.address}",
                found="an answer as text",
                expected="token_ids in the answer, as vLLM returns them",
                fix="Start the server with `deepspec serve`, or set regenerate.features = false.",
            )
        return Served(answers=answers, features=await self.features.probe(connection))

    async def ask(self, connection: Connection, served: Served, request: Turn) -> Answer:
        """As of Work."""
        if not request.ends:
            return await self.answering.ask(connection, served.answers, request)
        dialect, limit = served.answers.dialect, self.wanted.limit(request.prompt_ids)
        async with self.features.exchange.ticket(self.features.bytes_of(len(request.prompt_ids) + limit)) as ticket:
            asked = {"file": ticket.name, "include_output_tokens": True, "whole_answer": True}
            body = self.answering.body(served.answers, request)
            # What ends an answer are the stop tokens that are sent. They end it a token later (whole_answer).
            body |= {"ignore_eos": True, "request_id": ticket.name, "kv_transfer_params": asked}
            try:
                content = await connection.complete(body, seconds=self.wanted.timeout, path=dialect.path)
            except Refusal:
                ticket.settled = True
                raise
            except Fault as error:
                ticket.settled = error.kind in (Kind.DOWN, Kind.BUSY)
                raise
            said = _up_to(limit, dialect.in_form(content, body))
            answer = read(said, request, self.wanted, model=served.answers.model)
            text_T = torch.tensor(answer.completion.prompt_ids + answer.completion.output_ids)
            try:
                states = await self.features.states_in(content, ticket, text_T)
                features = await self.features.as_served(states, served.features, connection)
            except BadAnswer as error:
                return evolve(answer, lacks=error.error.problem)
            return evolve(answer, features=features)

    def tokens(self, answer: Answer) -> int:
        """The tokens that were generated."""
        return self.answering.tokens(answer)

    def describe(self, served: Served) -> str:
        """As of Work."""
        return f"{self.answering.describe(served.answers)}; {self.features.describe(served.features)}"

    def remark(self, answer: Answer) -> str | None:
        """Answers whose features did not come with them."""
        return None if answer.lacks is None else "without features"


def _up_to(limit: int, content: dict[str, Any]) -> dict[str, Any]:
    """The answer without the tokens that came after its end: those after a stop token, `read` leaves out itself."""
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return content
    ids = choices[0].get("token_ids")
    return {**content, "choices": [{**choices[0], "token_ids": ids[:limit]}]} if isinstance(ids, list) else content
