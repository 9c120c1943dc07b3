"""TCP connections are used again only with servers that wait for all of their connections at once."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from deepspec_core.servers.connection import Connection, client
from deepspec_core.servers.probe import listed

WANTED: Any = SimpleNamespace(timeout=60)


class Server(ThreadingHTTPServer):
    """Lists a model of `owner`. `opened`: connections so far; `hangs_up`: it closes each one after its first answer."""

    def __init__(self, owner: str) -> None:
        self.owner, self.opened, self.hangs_up = owner, 0, False
        self.closed = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        self.server.opened += 1
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()
        self.server.closed.set()

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "tiny", "owned_by": self.server.owner}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        # Nothing is said of it, as where an idle connection is closed.
        self.close_connection |= self.server.hangs_up

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(request.param)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


async def ask(server: Server, times: int) -> None:
    """The list of models, which tells whose server it is, and then the same as an ordinary request."""
    async with client(None) as shared:
        connection = Connection(f"http://127.0.0.1:{server.server_address[1]}/v1", shared)
        models, said = await listed(connection, WANTED)
        assert (models, said) == ([{"id": "tiny", "owned_by": server.owner}], [])
        for _ in range(times):
            if server.hangs_up:
                await asyncio.to_thread(server.closed.wait)
                server.closed.clear()
            assert (await connection.get("/models", seconds=60))["data"] == models


# The list itself is asked for before anybody knows.
@pytest.mark.parametrize(("server", "opened"), [("vllm", 2), ("sglang", 2), ("llamacpp", 5)], indirect=["server"])
def test_who_serves_all_connections_at_once_keeps_them(server: Server, opened: int) -> None:
    asyncio.run(ask(server, 4))
    assert server.opened == opened


@pytest.mark.parametrize("server", ["vllm"], indirect=True)
def test_a_connection_that_the_server_closed_is_replaced(server: Server) -> None:
    server.hangs_up = True
    asyncio.run(ask(server, 4))
    assert server.opened == 5
