"""A command that needs the Hugging Face Hub, where there is no network, or a network or a Hub that does not work."""

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

# Two small requests say whether a Hub works. The libraries' own retries are many more, and wait between them.
MOST_REQUESTS = 2


def _init(endpoint: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; from huggingface_hub import constants; constants.ENDPOINT = {endpoint!r}; "
        "from deepspec_core.cli.main import main; sys.exit(main(['init', 'organisation/model', '--draft', 'dflash']))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def _one_message(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("cannot be reached") == 1
    assert len(done.stderr.splitlines()) == 5


class _Broken(http.server.BaseHTTPRequestHandler):
    """Answers as `mode` says: its files, its programming interface, or both do not work."""

    mode: ClassVar[str] = ""
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        interface = self.path.startswith("/api/")
        if self.mode == "login":
            self._answer(200, "text/html")
        elif self.mode == "down" or (self.mode == "files down" and not interface):
            self._answer(503, "text/html")
        elif self.mode == "hangs" or (self.mode == "files hang" and not interface):
            time.sleep(600)  # the test would not end if the answer were waited for
        else:
            self._answer(200, "application/json")

    do_HEAD = do_GET

    def _answer(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(
    params=[
        "down",
        "files hang",
        *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("login", "hangs", "files down")),
    ]
)
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Broken, "mode", request.param)
    monkeypatch.setattr(_Broken, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Broken)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_the_command_line_says_it_in_one_message() -> None:
    _one_message(_init("http://127.0.0.1:9"))


def test_a_hub_that_does_not_work_is_one_message_too(broken: str) -> None:
    _one_message(_init(broken))
    assert 0 < len(_Broken.asked) <= MOST_REQUESTS, _Broken.asked
