"""Checks a server before its first answer, and again before a failed server is used again.

The server must serve the target, accept every sampling setting, and take samples of the longest length. A server that
ignores a setting would answer all the same, so each setting is sent once with an invalid value, which the server must
refuse. Knows one server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from attrs import evolve, frozen

from deepspec_core.decoding.engine import Request
from deepspec_core.errors import ConfigError
from deepspec_core.servers.connection import Connection, Fault, Kind, Refusal, shown
from deepspec_core.servers.dialects import Dialect, GenerationConfigText, TokenIds
from deepspec_core.servers.reading import choice_of, has_ids, read
from deepspec_core.servers.wanted import Wanted

# A server may have to load the model first.
_SECONDS: Final = 120.0
DIALECTS: Final[tuple[Dialect, ...]] = (TokenIds(), GenerationConfigText())
_NOT_READY: Final = (Kind.DOWN, Kind.DIED, Kind.BUSY)
_QUESTION: Final = [{"role": "user", "content": "?"}]


class NotServed(ConfigError):
    """The server answers, and cannot be used for this run."""


class NotServedNow(NotServed):
    """The server cannot be used now, and perhaps can later: its answers are damaged, or do not come."""


@frozen(kw_only=True)
class Served:
    """How a server is spoken to. `exact`: it returns token ids."""

    model: str
    dialect: Dialect
    exact: bool


async def probe(connection: Connection, wanted: Wanted, *, dialects: Sequence[Dialect] = DIALECTS) -> Served:
    """How the server is spoken to. NotServed where it cannot be used, Fault where nobody answers or it is not ready."""
    entry, models, said = await entry_of(connection, wanted)
    for dialect in dialects:
        for name in wanted.names if entry is None else (str(entry.get("id")),):
            served, refused = await _tried(connection, dialect, name, wanted)
            if served is not None and entry is None and dialect.lists_what_it_serves:
                raise _other_model(connection, models, wanted)
            if served is not None:
                await _require_settings(connection, served, wanted)
                return served
            said.append(f"{dialect.name}, as {name!r}: {refused}")
    raise NotServed(
        "A server takes no completion request for the target",
        where=_where(connection, wanted),
        found="\n            ".join(said),
        expected=f"an OpenAI-compatible server of {' or '.join(wanted.names)}, at an address like http://host:8000/v1",
        fix=f"If it knows the target by another name, set {wanted.called.served_as} to that name.",
    )


async def entry_of(
    connection: Connection, wanted: Wanted
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], list[str]]:
    """The target's entry in the server's list, the list, and what the server says in its place.

    NotServed if it serves another model, or only shorter texts. No entry if the list is not that of served models.
    """
    models, said = await listed(connection, wanted)
    entry = _entry(models, wanted.names)
    if entry is not None:
        _require_length(connection, entry, wanted)
    elif _is_engine(models):
        raise _other_model(connection, models, wanted)
    return entry, models, said


def _where(connection: Connection, wanted: Wanted) -> str:
    return f"{wanted.called.servers}: {connection.address}"


async def listed(connection: Connection, wanted: Wanted) -> tuple[list[dict[str, Any]], list[str]]:
    """The models that it lists, or what it says in their place: not every server can list what it serves.

    Sets `connection.keeps_open` by what they tell about the engine.
    """
    try:
        listed = await connection.get("/models", seconds=min(_SECONDS, wanted.timeout))
    except Refusal as error:
        return [], [f"/models: {error}"]
    except Fault as error:
        if error.kind in _NOT_READY:
            raise
        if error.kind is Kind.WRONG:
            raise NotServed(
                "A server lets nobody in without its key",
                where=_where(connection, wanted),
                found=error.reason,
                fix=f"Name the environment variable that holds the key in {wanted.called.key}.",
            ) from error
        return [], [f"/models: {error.reason}"]
    models = listed.get("data")
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        return [], [f"/models: {shown(str(listed))}"]
    # Both serve all connections from one event loop.
    connection.keeps_open = any(model.get("owned_by") in ("vllm", "sglang") for model in models)
    return models, []


def _entry(models: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any] | None:
    for key in ("id", "root"):
        for name in names:
            for model in models:
                if model.get(key) == name:
                    return model
    return None


def _is_engine(models: list[dict[str, Any]]) -> bool:
    """Whether the list is of what is served: such servers say whose model it is, or how long its texts may be."""
    return any(model.get("owned_by") in ("vllm", "sglang", "llamacpp") or "max_model_len" in model for model in models)


async def _tried(
    connection: Connection, dialect: Dialect, name: str, wanted: Wanted
) -> tuple[Served | None, str | None]:
    """How the server is spoken to if it takes this dialect and name, or what it says against them."""
    request = _request(wanted)
    try:
        body = dialect.body(wanted, model=name, prompt_ids=request.prompt_ids, limit=1, seed=0)
        sent = await connection.complete(body, seconds=min(_SECONDS, wanted.timeout), path=dialect.path)
        content = dialect.in_form(sent, body)
        exact = has_ids(choice_of(content, name))
        read(content, request, evolve(wanted, max_tokens=1), model=name)
    except Refusal as error:
        return None, str(error)
    except Fault as error:
        if error.kind in _NOT_READY:
            raise
        return None, error.reason
    return Served(model=name, dialect=dialect, exact=exact), None


def _request(wanted: Wanted) -> Request:
    return Request(id="probe", prompt_ids=wanted.tokenizer.render_prompt(_QUESTION), seed=0)


async def _require_settings(connection: Connection, served: Served, wanted: Wanted) -> None:
    prompt = _request(wanted).prompt_ids
    body = served.dialect.body(wanted, model=served.model, prompt_ids=prompt, limit=1, seed=0)
    for setting, change in served.dialect.impossible(wanted):
        try:
            await connection.complete(body | change, seconds=min(_SECONDS, wanted.timeout), path=served.dialect.path)
        except Refusal:
            continue
        except Fault as error:
            if error.kind in _NOT_READY:
                raise
            continue
        raise NotServed(
            "A server ignores a sampling setting",
            where=_where(connection, wanted),
            found=f"an answer to {setting} = {next(iter(change.values()))}",
            expected="a refusal",
            fix="Use vLLM, SGLang or `transformers serve`, or another version of this server.",
        )


def _require_length(connection: Connection, entry: dict[str, Any], wanted: Wanted) -> None:
    most = entry.get("max_model_len")
    if isinstance(most, int) and most < wanted.max_length:
        raise NotServed(
            "A server holds shorter texts than this run's samples",
            where=_where(connection, wanted),
            found=f"{most:,} tokens",
            expected=f"at least {wanted.max_length:,} ({wanted.called.length})",
            fix=f"Start it with room for longer texts (vLLM: --max-model-len), or lower {wanted.called.length}.",
        )


def _other_model(connection: Connection, models: list[dict[str, Any]], wanted: Wanted) -> NotServed:
    return NotServed(
        "A server serves another model",
        where=_where(connection, wanted),
        found=", ".join(str(model.get("id")) for model in models)[:200] or "no model",
        expected=" or ".join(wanted.names),
        fix=f"If it is this target by another name, say so in {wanted.called.served_as}.",
    )
