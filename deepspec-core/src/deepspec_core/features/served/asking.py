"""A farm's work (servers/work.py) of computing the hidden states of texts.

A text is sent as token ids, with a completion of one new token. The response names a file, which is read, checked and
removed. Knows the protocol; does not know which samples are requested, or how their features are used.

Legend: T tokens, K states of a token, H hidden size, C = taps * H.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.features.served.answer_file import States, read_states
from deepspec_core.features.served.answer_place import BadAnswer, opened, place_of, remove, told
from deepspec_core.features.served.exchange import Exchange, Ticket
from deepspec_core.features.served.final_norm import FinalNorm
from deepspec_core.features.served.layers import AskedLayers, consecutive
from deepspec_core.features.served.server_probe import Reference, precision_of
from deepspec_core.servers.connection import Connection, Fault, Kind, Refusal
from deepspec_core.servers.probe import NotServed, NotServedNow, entry_of
from deepspec_core.servers.wanted import Wanted

# A header, token ids, and what a file system adds.
_FILE_BYTES: Final = 8192
_ID_BYTES: Final = 8
_WIDEST: Final = 4
# A damaged answer to a probe may be a passing fault; one that does not come is waited for no longer than this.
_PROBE_TRIES: Final = 3
_PROBE_SECONDS: Final = 60.0
_SERVE: Final = "Start the server with `deepspec serve`."


@frozen(kw_only=True, eq=False)
class FeatureRequest:
    """A text whose features are asked for. input_ids: [T]."""

    id: str
    input_ids: Tensor


@frozen(kw_only=True, eq=False)
class Served:
    """How a server is asked. `normed`: whether its final states are after the target's last norm.

    compared: How its states of the short text compare with those that this run expects, one line each.
    """

    model: str
    normed: bool
    stored: str
    compared: tuple[str, ...] = ()


@frozen(kw_only=True, eq=False)
class Taken:
    """The features of a text, [T, C] and [T, H], and the bytes of the file that they came in."""

    id: str
    features: TargetFeatures
    size: int


@define(kw_only=True, eq=False)
class FeatureWork:
    """A servers.work.Work: the features of texts.

    wanted: The target's names, the key and the limits. max_length is one more than the longest text has, because a
        server counts the token that it adds.
    stored: The number format that all servers have to write; None: that of the first one that answers.
    sample: The text that a server is tried with. references: what its states of that text are compared with, each time.
    tried: What each address gave for the text, once it was accepted. precisions: what they were computed in.
    probe_pause: Seconds before a damaged answer to a probe is asked for again; doubled.
    """

    wanted: Wanted
    layers: AskedLayers
    hidden_size: int
    exchange: Exchange
    norm: FinalNorm | None
    file_timeout: float
    sample: Tensor
    stored: str | None = None
    references: tuple[Reference, ...] = ()
    probe_pause: float = 0.5
    tried: dict[str, TargetFeatures] = field(factory=dict, init=False)
    precisions: dict[str, str] = field(factory=dict, init=False)

    def bytes_of(self, tokens: int) -> int:
        """The size of the file of so many tokens at most: in the servers' number format, or the widest."""
        size = {"float8_e4m3": 1, "bfloat16": 2, "float16": 2}.get(self.stored or "", _WIDEST)
        states = len(self.layers.ids)
        return _FILE_BYTES + tokens * (_ID_BYTES + states * (size * self.hidden_size + (4 if size == 1 else 0)))

    async def probe(self, connection: Connection) -> Served:
        """Ask the server for a short text. NotServed where its states cannot be used, Fault where it is not ready.

        NotServedNow where it does not answer in time, or its answers are damaged each time.
        """
        seconds = min(self.wanted.timeout, _PROBE_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                for tries in range(_PROBE_TRIES - 1):
                    try:
                        return await self._probe(connection)
                    except NotServedNow:
                        await asyncio.sleep(self.probe_pause * 2**tries)
                return await self._probe(connection)
        except TimeoutError as error:
            raise NotServedNow(
                "A server does not answer in time",
                where=f"{self.wanted.called.servers}: {connection.address}",
                found=f"no states of a text of {len(self.sample)} tokens",
                expected=f"an answer within {seconds:g} s",
                fix="Look at the server's log, and whether it has too much to do.",
            ) from error

    async def _probe(self, connection: Connection) -> Served:
        # A server that hangs is told by the time that `probe` allows.
        entry, _, said = await entry_of(connection, evolve(self.wanted, timeout=2 * _PROBE_SECONDS))
        model = self.wanted.names[0] if entry is None else str(entry.get("id"))
        where = f"{self.wanted.called.servers}: {connection.address}"
        try:
            states = await self.states(connection, model, self.sample)
        except BadAnswer as error:
            wrong = error.error
            raise (NotServedNow if error.kind is Kind.BAD else NotServed)(
                wrong.problem,
                where=f"{where}: {wrong.where}",
                found=wrong.found,
                expected=wrong.expected,
                fix=wrong.fix,
            ) from error
        except Refusal as error:
            raise NotServed(
                "A server takes no request for hidden states",
                where=where,
                found="; ".join([*said, str(error)]),
                expected="an answer to a completion request of one token, with token ids as its prompt",
                fix=f"{_SERVE} If it knows the target by another name, say so in {self.wanted.called.served_as}.",
            ) from error
        except Fault as error:
            if error.kind in (Kind.DOWN, Kind.DIED, Kind.BUSY):
                raise
            raise (NotServedNow if error.kind is Kind.BAD else NotServed)(
                "A server gives no hidden states",
                where=where,
                found="; ".join([*said, error.reason]),
                expected="an OpenAI-compatible server with hidden states, at an address like http://host:8000/v1",
                fix=_SERVE,
            ) from error
        if self.stored is not None and states.stored != self.stored:
            raise NotServed(
                "A server writes another number format than the others, or than this run began with",
                where=where,
                found=states.stored,
                expected=self.stored,
                fix="Start all servers with the same --stored-as. A stage goes on in the format it was begun with.",
            )
        normed = self._normed(states, where)
        features, precision = self._features(states, normed), states.stored
        if precision == "float32":
            precision = precision_of(states.states)
        named = self.by_name(features)
        compared = tuple(reference.require(named, precision, where=where) for reference in self.references)
        self.stored = states.stored
        self.tried[connection.address], self.precisions[connection.address] = features, precision
        return Served(model=model, normed=normed, stored=states.stored, compared=compared)

    async def ask(self, connection: Connection, served: Served, request: FeatureRequest) -> Taken:
        """The features of a text, in the order of the taps."""
        states = await self.states(connection, served.model, request.input_ids)
        features = await self.as_served(states, served, connection)
        return Taken(id=request.id, features=features, size=states.size)

    async def as_served(self, states: States, served: Served, connection: Connection) -> TargetFeatures:
        """The features in states. BadAnswer where these are not as the server's when it was tried."""
        if states.stored != served.stored:
            raise BadAnswer(
                "A server changed its number format",
                kind=Kind.WRONG,
                where=connection.address,
                found=states.stored,
                expected=served.stored,
            )
        if states.normed is not None and states.normed != served.normed:
            raise BadAnswer(
                "A server changed what it gives as the final state",
                kind=Kind.WRONG,
                where=connection.address,
                found=f"normed = {states.normed}",
                expected=f"normed = {served.normed}",
            )
        return await asyncio.to_thread(self._features, states, served.normed)

    def tokens(self, answer: Taken) -> int:
        """The tokens of the text."""
        return len(answer.features.last_hidden)

    def describe(self, served: Served) -> str:
        """As of Work."""
        when = "after" if served.normed else "before"
        what = f"{served.model}: states in {served.stored}, the final one {when} the last norm"
        return "; ".join((what, *served.compared))

    def remark(self, answer: Taken) -> str | None:
        """None: a server's counts say it all."""
        return None

    def by_name(self, features: TargetFeatures) -> dict[str, Tensor]:
        """The features [T, C] and [T, H] of a text, by the name of each state."""
        tapped = features.hidden.chunk(len(self.layers.taps), -1) if self.layers.taps else ()
        named = {self.layers.name(column): state for column, state in zip(self.layers.columns, tapped, strict=True)}
        return named | {self.layers.name(len(self.layers.ids) - 1): features.last_hidden}

    async def states(self, connection: Connection, model: str, ids: Tensor) -> States:
        """What the server gives for a text [T], checked. Its file is removed. Fault or Refusal where there is none."""
        async with self.exchange.ticket(self.bytes_of(len(ids))) as ticket:
            body = {
                "model": model,
                "prompt": ids.tolist(),
                "max_tokens": 1,
                "temperature": 0.0,
                # vLLM's stock connector names its file after the request, ours after what it is told.
                "request_id": ticket.name,
                "kv_transfer_params": {"file": ticket.name},
            }
            try:
                answer = await connection.complete(body, seconds=self.wanted.timeout)
            except Refusal:
                ticket.settled = True
                raise
            except Fault as error:
                ticket.settled = error.kind in (Kind.DOWN, Kind.BUSY)
                raise
            return await self.states_in(answer, ticket, ids)

    async def states_in(self, answer: dict[str, Any], ticket: Ticket, ids: Tensor) -> States:
        """The states of a text [T] in the file that an answer names, checked. The file is removed. Errors as above."""
        place = place_of(_path_in(answer), name=ticket.name, folder=self.exchange.folder)
        file = await opened(place, seconds=self.file_timeout)
        try:
            return await asyncio.to_thread(self._read, file, place, ids)
        finally:
            remove(place)
            ticket.settled = True

    def _read(self, file: Any, place: Path, ids: Tensor) -> States:
        # Closed here: a thread that was given up still reads, and the number of a closed file may be another's by then.
        try:
            with file:
                return read_states(file, place, ids=ids, layers=self.layers, hidden_size=self.hidden_size)
        except OSError as error:
            raise BadAnswer(
                "A server's file cannot be read",
                where=place,
                found=error.strerror,
                expected="a whole file",
                fix="Look at the file system of the exchange folder.",
            ) from error

    def _features(self, states: States, normed: bool) -> TargetFeatures:
        columns, values_TKH = list(self.layers.columns), states.states
        tapped_TLH = values_TKH[:, : len(columns)] if consecutive(columns) else values_TKH[:, columns]
        last_TH = values_TKH[:, -1]
        if not normed:
            assert self.norm is not None, "a server whose states cannot be normed was refused"
            last_TH = self.norm(last_TH)
        return TargetFeatures(hidden=tapped_TLH.flatten(1).contiguous(), last_hidden=last_TH.contiguous())

    def _normed(self, states: States, where: str) -> bool:
        """Whether the final state is normed: what the file says, and what can be measured. NotServed where unknown."""
        measured = None if self.norm is None else self.norm.is_normed(states.states[:, -1])
        said = states.normed
        if said is not None and measured is not None and said != measured:
            raise NotServed(
                "A server's final state is not what its file says",
                where=where,
                found=f"normed = {str(said).lower()}, of states that are {'normed' if measured else 'not normed'}",
                expected="the state that the file says",
                fix="Check that the server serves this very target, and in this revision.",
            )
        normed = said if measured is None else measured
        if normed is None:
            raise NotServed(
                "It is not known whether a server's final state is before or after the target's last norm",
                where=where,
                found="a file that does not say it, and a norm that it cannot be measured with",
                expected="`normed` in the file's metadata",
                fix=_SERVE,
            )
        if not normed and self.norm is None:
            raise NotServed(
                "A server's final state is before the target's last norm, which cannot be read apart from the target",
                where=where,
                found="normed = false",
                expected="a final state after the norm",
                fix="Use another server, or compute features in this process (features.mode).",
            )
        return normed


def _path_in(answer: dict[str, Any]) -> Any:
    """The path that an answer names; BadAnswer where it has no place for one."""
    params = answer.get("kv_transfer_params")
    if not isinstance(params, dict):
        raise BadAnswer(
            "A server gives no hidden states with its answer",
            kind=Kind.WRONG,
            where="kv_transfer_params",
            found=told(answer),
            expected="kv_transfer_params.hidden_states_path",
            fix="Start the server with `deepspec serve`, which turns that on.",
        )
    if params.get("hidden_states_path") is None and params.get("hidden_states_error") is not None:
        raise BadAnswer(
            "A server could not write the hidden states of a text",
            where="kv_transfer_params.hidden_states_error",
            found=told(params["hidden_states_error"]),
            expected="kv_transfer_params.hidden_states_path",
            fix="Look at the server's log, and at what it was started with.",
        )
    return params.get("hidden_states_path")


def short_sample(prompt_ids: tuple[int, ...], most: int) -> Tensor:
    """The text [T] that servers are tried with."""
    return torch.tensor(prompt_ids[:most], dtype=torch.int64)
