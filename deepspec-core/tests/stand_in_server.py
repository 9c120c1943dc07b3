"""A server on loopback, in the test process, that speaks the dialects of OpenAI-compatible servers, with their faults.

It answers greedily with a target in this process. Knows HTTP and dialects; not what is tested with it.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetModel
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Request, decode

MODEL = "tiny"
# Below these no setting may be.
LEAST = {"temperature": 0.0, "top_p": 1e-9, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1e-9}
TEXT_KEYS = {"model", "prompt", "seed", "generation_config", "stream", "temperature", "top_p", "max_tokens", "stop"}
# Servers may share a target, which has one cache.
_ONE_AT_A_TIME = threading.Lock()
HTML = b"<html><body>Welcome to the gateway</body></html>"


class StandIn:
    """The server. `faults`: what the next completions do in place of an answer, one each; `asked`: requests' bodies.

    `dialect` is "vllm", "sglang" (ids in, text out), "transformers", or "deaf" (as sglang, and it ignores settings).
    """

    def __init__(self, target: TargetModel, tokenizer: ChatTokenizer, stop_ids: Sequence[int], dialect: str) -> None:
        self.target, self.tokenizer, self.stop_ids, self.dialect = target, tokenizer, tuple(stop_ids), dialect
        self.model, self.max_model_len, self.key = MODEL, 4096, None
        self.faults: list[str] = []
        self.always: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.dead, self.has_hub_cache = False, False
        self.at_once = self.most_at_once = 0
        self._released = threading.Event()
        self._listen(0)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        """Nobody listens any more, and open connections break."""
        self.dead = True
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self.listens = False

    def start_again(self) -> None:
        """At the same port."""
        wait_until(lambda: not self.listens)
        self.dead = False
        self._released.clear()
        self._listen(self.port)

    def _listen(self, port: int) -> None:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stand_in.get(self)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.post(self, body)

            def log_message(self, *_: Any) -> None:
                pass

        ThreadingHTTPServer.daemon_threads = True
        ThreadingHTTPServer.block_on_close = False
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port, self.listens = self._server.server_address[1], True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if self.dead:
            _break(handler)
        elif self.always == "html":
            _say(handler, HTML, kind="text/html")
        elif handler.path == "/health":
            _say(handler, b"")
        elif self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
            _say(handler, b'{"error": "who are you?"}', status=401)
        elif self.dialect == "transformers":
            # It lists the user's Hub cache, or fails where there is none.
            listed = {"object": "list", "data": [{"id": "some/other", "owned_by": "some"}]}
            _say_json(handler, listed) if self.has_hub_cache else _say(handler, b"Internal", status=500)
        else:
            entry = {"id": self.model, "root": f"/models/{self.model}", "owned_by": self.dialect}
            _say_json(handler, {"object": "list", "data": [entry | {"max_model_len": self.max_model_len}]})

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if self.dead:
            return _break(handler)
        refused = self._refused(body)
        if refused is not None:
            return _say_json(handler, {"error": refused[1]}, status=refused[0])
        limit = self._limit(body)
        # Probes ask for one token.
        fault = self.always or (self.faults.pop(0) if self.faults and limit > 1 else None)
        if limit > 1:
            self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if not self._misbehaves(handler, fault):
                answer = self._answer(body, limit, fault)
                _break(handler) if self.dead else _say_json(handler, answer)
        finally:
            self.at_once -= 1
        return None

    def _misbehaves(self, handler: BaseHTTPRequestHandler, fault: str | None) -> bool:
        if fault == "html":
            _say(handler, HTML, kind="text/html")
        elif fault == "500":
            _say_json(handler, {"error": "out of memory"}, status=500)
        elif fault == "busy":
            _say_json(handler, {"error": "too many requests"}, status=429)
        elif fault == "hang":
            self._released.wait(30)
            _break(handler)
        elif fault == "broken":
            _say(handler, b'{"choices": [{"te', length=4000)
            _break(handler)
        elif fault == "stops":
            threading.Thread(target=self.stop).start()
            self._released.wait(30)
            _break(handler)
        else:
            return False
        return True

    def _refused(self, body: dict[str, Any]) -> tuple[int, str] | None:
        if body["model"] not in (self.model, f"{self.model}@main"):
            return 400, f"Server is pinned to '{self.model}'; requested '{body['model']}'."
        if self.dialect == "transformers":
            unknown = body.keys() - TEXT_KEYS
            if unknown:
                return 422, f"Unexpected fields in the request: {unknown}"
            try:
                json.loads(body["generation_config"])
            except ValueError:
                return 500, "Internal Server Error"
            return None if isinstance(body["prompt"], str) else (400, "prompt must be a string.")
        if self.dialect == "deaf":
            return None
        low = [name for name, least in LEAST.items() if body.get(name, least) < least]
        return (400, f"{low[0]} is too small") if low else None

    def _limit(self, body: dict[str, Any]) -> int:
        if self.dialect == "transformers":
            return int(json.loads(body["generation_config"])["max_new_tokens"])
        return int(body.get("max_tokens", 16))

    def _answer(self, body: dict[str, Any], limit: int, fault: str | None) -> dict[str, Any]:
        prompt = body["prompt"]
        ids = tuple(self.tokenizer.encode(prompt)[0] if isinstance(prompt, str) else prompt)
        with _ONE_AT_A_TIME:
            (done,) = decode(
                self.target,
                None,
                [Request(id="x", prompt_ids=ids, seed=0)],
                sampling=Sampling(),
                stop_ids=self.stop_ids,
                max_new_tokens=limit,
                batch_size=1,
                max_length=4096,
            )
        output = list(done.output_ids)
        text = self.tokenizer.decode(output if output[-1] not in self.stop_ids else output[:-1])
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": done.finish_reason}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(output)}
        if self.dialect == "vllm":
            choice |= {"token_ids": output, "prompt_token_ids": list(ids)}
        if fault == "half":
            choice |= {"token_ids": output[:2], "text": text[:2], "finish_reason": "abort"}
        if fault == "other prompt":
            choice["prompt_token_ids"] = [5, 6]
        if fault == "other count":
            usage["completion_tokens"] += 1
        model = "somebody/else" if fault == "other model" else body["model"]
        choices = [] if fault == "no choice" else [choice]
        return {"id": "1", "object": "text_completion", "model": model, "choices": choices, "usage": usage}


@contextmanager
def standing_in(
    target: TargetModel, tokenizer: ChatTokenizer, stop_ids: Sequence[int], *dialects: str
) -> Iterator[list[StandIn]]:
    """A server for each dialect; they are stopped in the end."""
    servers = [StandIn(target, tokenizer, stop_ids, dialect) for dialect in dialects]
    try:
        yield servers
    finally:
        for server in servers:
            if not server.dead:
                server.stop()


def _say(
    handler: BaseHTTPRequestHandler,
    content: bytes,
    *,
    kind: str = "application/json",
    status: int = 200,
    length: int = 0,
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(length or len(content)))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def _say_json(handler: BaseHTTPRequestHandler, content: dict[str, Any], status: int = 200) -> None:
    _say(handler, json.dumps(content).encode(), status=status)


def _break(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Wait for something another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)
