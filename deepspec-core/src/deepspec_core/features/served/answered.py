"""A farm's work of generating answers together with the hidden states of prompt and answer.

The target reads a conversation once, because the server writes its hidden states while it answers. If the states of an
answer are missing, the answer still counts, and the states are requested later as for any other text. Knows answers and
the protocol of features; does not know which conversations are answered, or where features go.

Legend: T tokens of a prompt and its answer.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from attrs import evolve, frozen

from deepspec_core.data.answering import Answer, Turn
from deepspec_core.features.served.answer_place import BadAnswer, told
from deepspec_core.features.served.asking import FeatureWork
from deepspec_core.features.served.asking import Served as ServedFeatures
from deepspec_core.servers.answering import Answering
from deepspec_core.servers.connection import Connection, Fault, Kind, Refusal
from deepspec_core.servers.dialects import TokenIds
from deepspec_core.servers.probe import NotServed, NotServedNow
from deepspec_core.servers.probe import Served as ServedAnswers
from deepspec_core.servers.reading import read
from deepspec_core.servers.wanted import Wanted

_SERVE: Final = "Start the server with `deepspec serve` of this version, or set regenerate.features = false."
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
        """As of Work. A server has to return token ids, which features belong to, and to know what is asked here."""
        where = f"{self.wanted.called.servers}: {connection.address}"
        features = await self.features.probe(connection)
        try:
            return await self._probe(connection, features, where)
        except Refusal as error:
            raise NotServed(
                "A server takes no request for an answer with features",
                where=where,
                found=str(error),
                expected="a completion whose file holds prompt and answer",
                fix=_SERVE,
            ) from error

    async def _probe(self, connection: Connection, features: ServedFeatures, where: str) -> Served:
        # Before answers are tried: each of these requests would leave a file.
        await self._require_no_file(connection, features.model, where)
        answers = await self.answering.probe(connection)
        if not answers.exact:
            raise NotServed(
                "A server returns no token ids, so it is not known what its features belong to",
                where=where,
                found="an answer as text",
                expected="token_ids in the answer, as vLLM returns them",
                fix=_SERVE,
            )
        served = Served(answers=answers, features=features)
        await self._require_whole(connection, served, where)
        return served

    async def _require_no_file(self, connection: Connection, model: str, where: str) -> None:
        ids = self.features.sample.tolist()
        async with self.features.exchange.ticket(self.features.bytes_of(len(ids) + 1)) as ticket:
            asked = {"file": ticket.name, "write": False}
            body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "kv_transfer_params": asked}
            content = await connection.complete(body | {"request_id": ticket.name}, seconds=self.wanted.timeout)
            said = content.get("kv_transfer_params")
            if not isinstance(said, dict) or said.get("hidden_states_path") is None:
                ticket.settled = True
                return
        raise NotServed(
            "A server leaves a file for every answer, also where none is asked for",
            where=where,
            found=told(said),
            expected='no file, since "write" is false',
            fix=_SERVE,
        )

    async def _require_whole(self, connection: Connection, served: Served, where: str) -> None:
        """An answer of one token, with the state behind it."""
        one = evolve(self.answering, wanted=evolve(self.wanted, max_tokens=1))
        prompt_T = self.features.sample[: self.wanted.max_length - 1]
        turn = Turn(id="probe", prompt_ids=tuple(prompt_T.tolist()), seed=0)
        answer = await evolve(self, answering=one).ask(connection, served, turn)
        if answer.lacks is not None:
            raise NotServedNow(
                "A server does not give the features of a whole answer",
                where=where,
                found=answer.lacks,
                expected="states of the prompt and of all tokens of the answer",
                fix=_SERVE,
            )

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
