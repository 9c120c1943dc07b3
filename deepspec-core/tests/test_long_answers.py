"""A server that never ends its answer fills no memory. Its answer is bad, and other answers are as they were."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deepspec_core.servers import connection as connections
from deepspec_core.servers.connection import Connection, Fault, Kind, client

MIB = 1 << 20


@contextmanager
def sending(parts: Iterator[bytes], *, kind: str = "application/json") -> Iterator[tuple[str, list[int]]]:
    """The address of a server that sends these parts, and how many bytes it could send so far."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            try:
                for part in parts:
                    self.wfile.write(part)
                    sent.append(len(part))
            except OSError:
                pass  # the other side has enough

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", sent
    finally:
        server.shutdown()
        server.server_close()


def asked(address: str, path: str) -> Any:
    async def ask() -> Any:
        async with client(None) as shared:
            connection = Connection(address, shared)
            if path == "/health":
                return await connection.alive(seconds=60)
            return await (connection.text(path, seconds=60) if path == "/metrics" else connection.get(path, seconds=60))

    return asyncio.run(ask())


@pytest.mark.parametrize("path", ["/models", "/metrics"])
def test_an_answer_without_an_end_is_bad(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LONGEST_ANSWER", 4 * MIB)
    monkeypatch.setattr(connections, "_CONNECT_SECONDS", 60.0)  # a busy machine may need more than ten seconds
    with sending(b" " * MIB for _ in range(400)) as (address, sent), pytest.raises(Fault) as caught:
        asked(address, path)
    assert caught.value.kind is Kind.BAD
    assert "more than 4 MiB" in caught.value.reason
    assert sum(sent) < 100 * MIB


def test_a_health_check_reads_no_body() -> None:
    with sending(b" " * MIB for _ in range(400)) as (address, sent):
        assert asked(address, "/health") is True
    assert sum(sent) < 100 * MIB


@pytest.mark.parametrize("charset", ["utf-8", "latin-1", "no-such-charset", "base64"])
def test_an_answer_is_text_in_the_charset_that_it_names(charset: str) -> None:
    encoded = "µ 1".encode("latin-1" if charset == "latin-1" else "utf-8")
    with sending(iter([encoded]), kind=f"text/plain; charset={charset}") as (address, _):
        assert asked(address, "/metrics") == "µ 1"
