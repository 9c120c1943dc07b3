"""One server over HTTP: sends requests, and describes exchanges that fail.

Knows HTTP and JSON; does not know what a completion means, or other servers. An API key is sent in a header and stored
nowhere else.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

import httpx2
from attrs import define, field, frozen

_CONNECT_SECONDS: Final = 10.0
# Engines close a connection that was idle for five seconds (vLLM, SGLang). A request that is sent just then is lost.
_IDLE_SECONDS: Final = 2.0
_SHOWN: Final = 160
# Completions with token ids, and counters, have less than a hundredth of it. A longer answer would fill the memory.
_LONGEST_ANSWER: Final = 64 * 2**20
# The request cannot be answered, on this server or on another of its kind.
_REFUSALS: Final = (400, 413, 422)
_NO_ENTRY: Final = (401, 403)
_BUSY: Final = (429, 503)
_CLOSE: Final = {"Connection": "close"}


class Kind(Enum):
    """What a failed exchange says about the server.

    DOWN: no answer. DIED: it broke off an answer. WRONG: it is another server than expected. BUSY: it has too much to
    do. BAD: this answer cannot be used.
    """

    DOWN = "down"
    DIED = "died"
    WRONG = "wrong"
    BUSY = "busy"
    BAD = "bad"


class Fault(Exception):
    """An exchange that failed on the server's side. `wait`: seconds that the server asks to wait."""

    def __init__(self, kind: Kind, reason: str, wait: float = 0.0) -> None:
        self.kind, self.reason, self.wait = kind, reason, wait
        super().__init__(reason)


class Refusal(Exception):
    """The server does not take this request."""


def shown(text: str) -> str:
    """The beginning of what a server said, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else line[:_SHOWN] + "...")


def client(key: str | None) -> httpx2.AsyncClient:
    """What all connections share. Use it in an `async with` block."""
    return httpx2.AsyncClient(
        headers={} if key is None else {"Authorization": f"Bearer {key}"},
        # Answers take long: whoever asks sets the limit.
        timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_SECONDS),
    )


@frozen(kw_only=True)
class _Answer:
    status: int
    content: bytes
    text: str
    retry_after: str | None


@define(eq=False)
class Connection:
    """A server's address.

    keeps_open: Whether TCP connections are used for several requests. Each request has one of its own unless the server
    is known to wait for all of its connections at once: one that gives each connection a thread, as llama.cpp's does,
    would serve as many as it has threads and let the others wait.
    """

    address: str
    _client: httpx2.AsyncClient = field(repr=False)
    keeps_open: bool = False

    async def get(self, path: str, *, seconds: float) -> dict[str, Any]:
        """The JSON object at a path under the address. Fault or Refusal where there is none."""
        return _object(await self._exchange("GET", self.address.rstrip("/") + path, None, seconds))

    async def complete(
        self, body: Mapping[str, Any], *, seconds: float, path: str = "/v1/completions"
    ) -> dict[str, Any]:
        """The answer to a completion request, as it came. Fault or Refusal where there is none.

        `path` begins at the server's root. An address without /v1 is that of another root for the protocol's own paths.
        """
        own = path.startswith("/v1/")
        url = self.address.rstrip("/") + path.removeprefix("/v1") if own else self._root + path
        return _object(await self._exchange("POST", url, body, seconds))

    async def text(self, path: str, *, seconds: float) -> str:
        """The text at a path of the server's root. Fault or Refusal where there is none."""
        return str((await self._exchange("GET", self._root + path, None, seconds)).text)

    @property
    def _root(self) -> str:
        return self.address.rstrip("/").removesuffix("/v1")

    async def alive(self, *, seconds: float) -> bool:
        """Whether the server answers at all, with whatever status."""
        try:
            async with asyncio.timeout(seconds):
                async with self._client.stream("GET", f"{self._root}/health", headers=_CLOSE) as answer:
                    return bool(answer.status_code < 500)
        except (httpx2.HTTPError, TimeoutError):
            return False

    async def _exchange(self, method: str, url: str, body: Mapping[str, Any] | None, seconds: float) -> _Answer:
        try:
            headers = {} if self.keeps_open else _CLOSE
            async with asyncio.timeout(seconds), self._client.stream(method, url, json=body, headers=headers) as sent:
                answer = await _read(sent)
        except TimeoutError as error:
            raise Fault(Kind.BAD, f"no answer within {seconds:g} s") from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Fault(Kind.DOWN, f"it cannot be reached: {error}") from error
        except httpx2.HTTPError as error:
            raise Fault(Kind.DIED, f"it broke off: {type(error).__name__} {error}".strip()) from error
        status, said = answer.status, shown(answer.text)
        if status in _REFUSALS:
            raise Refusal(f"{status} {said}")
        if status in _NO_ENTRY:
            raise Fault(Kind.WRONG, f"{status} {said}")
        if status in _BUSY:
            raise Fault(Kind.BUSY, f"{status} {said}", _seconds(answer.retry_after))
        if status != 200:
            raise Fault(Kind.BAD, f"{status} {said}")
        return answer


async def _read(sent: httpx2.Response) -> _Answer:
    """The whole answer. Fault where it is longer than any that is asked for."""
    content = bytearray()
    async for part in sent.aiter_bytes():
        content += part
        if len(content) > _LONGEST_ANSWER:
            raise Fault(Kind.BAD, f"{sent.status_code}, with more than {_LONGEST_ANSWER >> 20} MiB")
    return _Answer(
        status=sent.status_code,
        content=bytes(content),
        text=_decoded(content, sent.charset_encoding),
        retry_after=sent.headers.get("retry-after"),
    )


def _decoded(content: bytes | bytearray, charset: str | None) -> str:
    try:
        return content.decode(charset or "utf-8", "replace")
    except (LookupError, ValueError):  # a charset that does not exist, or is none of text
        return content.decode("utf-8", "replace")


def _object(answer: _Answer) -> dict[str, Any]:
    try:
        content = json.loads(answer.content)
    except (ValueError, RecursionError) as error:
        raise Fault(Kind.BAD, f"no JSON: {shown(answer.text)}") from error
    if not isinstance(content, dict):
        raise Fault(Kind.BAD, f"no JSON object: {shown(answer.text)}")
    return content


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, min(60.0, float(header or 0)))
    except ValueError:  # a date
        return 0.0
