"""`deepspec serve`: the command that it shows, what it refuses, and how it starts, watches and ends an engine.

The engine is a small program in vLLM's place; with vLLM itself it is tested in tests/test_features_by_vllm.py.
"""

import json
import os
import shlex
import signal
import socket
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from attrs import evolve

from deepspec_core.cli.main import main
from deepspec_core.servers.vllm_command import CONNECTOR, Served
from deepspec_core.servers.vllm_process import Engine

TARGET = ["builtin:tiny-qwen3", "--layers", "1,5,9"]
# Answers like vLLM with the connector; how it misbehaves stands in FAULT.
PROGRAM = """#!{python}
import http.server, json, os, pathlib, struct, sys

options = dict(zip(sys.argv, sys.argv[1:]))
draft = json.loads(options["--speculative-config"])["draft_model_config"]
layers = draft["hf_config"]["eagle_aux_hidden_state_layer_ids"]
folder = json.loads(options["--kv-transfer-config"])["kv_connector_extra_config"]["shared_storage_path"]
fault = os.environ.get("FAULT", "")
print("the engine reads its weights", flush=True)
if fault == "ends":
    sys.exit("no room for the weights")
if fault == "noise":
    print("WARNING 11-30 [system.py:2] ImportError: no such kernel (optional, ignored)")
    print("(Worker pid=7) ERROR 11-30 [executor.py:3] Traceback (most recent call last):")
    print("(Worker pid=7) ERROR 11-30 [executor.py:3] RuntimeError: index 9 is out of bounds")
    print("\\x1b[0;36m(EngineCore_DP0 pid=9)\\x1b[0;0m EngineDeadError: see above")
    for number in range(4000):
        print("leaked function", number)
    sys.exit(0)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != ("Bearer k" if "VLLM_API_KEY" in os.environ else None):
            self.send_error(401)
            return
        if fault == "refuses":
            self.send_error(400, "no such model")
            return
        path = pathlib.Path(folder) / (body["kv_transfer_params"]["file"] + ".safetensors")
        count = len(layers) - (fault == "fewer")
        entry = {{"dtype": "BF16", "shape": [3, count, 1], "data_offsets": [0, 6 * count]}}
        header = json.dumps({{"__metadata__": {{"layers": json.dumps(layers)}}, "hidden_states": entry}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(6 * count))
        path.with_name(path.name + ".lock").touch()
        self.answer({{"kv_transfer_params": None if fault == "none" else {{"hidden_states_path": str(path)}}}})
    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())
    def log_message(self, *words):
        pass

http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return path


def _words(text: str) -> dict[str, str]:
    """A command shown by --dry-run: option to value."""
    words = shlex.split(text)
    return dict(pairwise(words))


def test_the_command_of_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*TARGET, "--exchange", str(tmp_path / "x"), "--dtype", "float16", "--max-length", "1024", "--dry-run"]
    assert main(["serve", *asked, "--", "--tensor-parallel-size", "8"]) == 0
    out = capsys.readouterr().out
    found = _words(out)
    layers = json.loads(found["--speculative-config"])["draft_model_config"]["hf_config"]
    assert layers == {"eagle_aux_hidden_state_layer_ids": [2, 6, 10, 12]}
    transfer = json.loads(found["--kv-transfer-config"])
    # Files have no float16, whose numbers are all in float32.
    assert transfer["kv_connector_extra_config"] == {"shared_storage_path": str(tmp_path / "x"), "dtype": "float32"}
    assert transfer["kv_connector_module_path"] == CONNECTOR.stem
    assert f"PYTHONPATH={CONNECTOR.parent} " in out
    assert [path.name for path in CONNECTOR.parent.glob("*.py")] == [CONNECTOR.name], "more could hide vLLM's own"
    assert (found["--host"], found["--dtype"], found["--tensor-parallel-size"]) == ("127.0.0.1", "float16", "8")
    # One more than the target has positions: of the token that nobody reads.
    assert found["--max-model-len"] == "1025"
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1" in out
    assert not (tmp_path / "x").exists(), "a dry run makes nothing"


def test_the_command_of_a_run_file(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["serve", str(run_file), "--exchange", str(tmp_path), "--stored-as", "float8_e4m3", "--dry-run"]
    assert main([*asked, "--set", "target.layers=[-1, 3]", "--set", "data.max_length=200"]) == 0
    found = _words(capsys.readouterr().out)
    layers = json.loads(found["--speculative-config"])["draft_model_config"]["hf_config"]
    assert layers == {"eagle_aux_hidden_state_layer_ids": [0, 4, 12]}
    assert json.loads(found["--kv-transfer-config"])["kv_connector_extra_config"]["dtype"] == "float8_e4m3"
    assert (found["--max-model-len"], found["--served-model-name"]) == ("201", "builtin:tiny-qwen3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*TARGET], "--exchange"),
        (["builtin:tiny-qwen3", "--exchange", "x"], "--layers"),
        (["builtin:tiny-qwen3", "--layers", "1;2", "--exchange", "x"], "whole numbers"),
        (["builtin:tiny-qwen3", "--layers", "1,11", "--exchange", "x"], "Leave out or lower 11"),
        (["builtin:tiny-qwen", "--layers", "1", "--exchange", "x"], "tiny-qwen3"),
        ([*TARGET, "--exchange", "x", "--set", "train.lr=1"], "--set changes keys of a run file"),
        ([*TARGET, "--exchange", "x", "--", "--kv_transfer_config.kv_role=kv_both"], "--exchange and --stored-as"),
        ([*TARGET, "--exchange", "x", "--", "--enable-prefix-caching"], "--enable-prefix-caching"),
        ([*TARGET, "--exchange", "x", "--", "--api-key=k"], "VLLM_API_KEY"),
        ([*TARGET, "--exchange", "x", "--", "-sc", "{}"], "-sc, which vLLM reads as --speculative-config"),
        ([*TARGET, "--exchange", "x", "--", "-tp", "8", "-sc.method=eagle"], "--layers of deepspec serve"),
        ([*TARGET, "--exchange", "x", "--", "--max-model=9"], "--max-length of deepspec serve"),
        ([*TARGET, "--exchange", "x", "--", "--served_model", "x"], "--served-model-name"),
        ([*TARGET, "--exchange", "x", "--", "--no-enforce-eager"], "it is set already"),
        ([*TARGET, "--exchange", "x", "--", "--uds", "/x"], "HTTP at --host and --port"),
        ([*TARGET, "--exchange", "x", "--", "--ssl-certfile=x"], "HTTP at --host and --port"),
        ([*TARGET, "--exchange", "x", "--", "--config", "x.yaml"], "write its options behind --"),
        ([*TARGET, "--exchange", "x", "tensor"], "Unexpected 'tensor'"),
        ([*TARGET, "--exchange", "x", "--vllm", "no-such-program"], "docs/target-elsewhere.md"),
    ],
)
def test_mistakes_are_told(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_file_says_is_not_said_again(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(run_file), "--exchange", "x", "--layers", "1"]) == 2
    assert "--set target.layers=" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_at_once(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        asked = [*TARGET, "--exchange", str(tmp_path / "x"), "--vllm", str(program), "--port", port]
        assert main(["serve", *asked]) == 2
    assert f"--port {port}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_it_says_when_the_engine_answers_and_ends_with_it(
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    served = Served(
        target="here",
        names=("here",),
        taps=(1,),
        num_layers=12,
        max_positions=64,
        exchange=tmp_path,
        dtype="float32",
        port=_free_port(),
        executable=str(program),
    )
    lines = []
    # Tests that were started by nohup ignore SIGHUP, and so would the engine.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("  exchange"):
            os.kill(os.getpid(), number)

    try:
        assert Engine(served, say=say).run() == code
    finally:
        signal.signal(signal.SIGHUP, before)
    assert f"answers at {served.address}/v1" in lines[0]
    assert json.loads(lines[1].partition("=")[2]) == [f"{served.address}/v1"]
    assert json.loads(lines[2].partition("=")[2]) == str(tmp_path)
    assert lines[3] == '  api_key_env = "VLLM_API_KEY"', "a run that lacks it is refused by the server"
    # Trainers on other machines copy the line, and their own loopback is another machine.
    assert evolve(served, host="0.0.0.0").address_elsewhere == f"http://{socket.gethostname()}:{served.port}"
    assert "the engine reads its weights" in capfd.readouterr().err, "what it writes is shown"
    assert list(tmp_path.glob("*.safetensors*")) == [], "its first file is removed"
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", served.port)) != 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("ends", ["vLLM ended before it answered", "exit code 1", "no room for the weights"]),
        (
            "noise",
            ["exit code 0; its first error was: RuntimeError: index 9 is out of bounds;", "leaked function 3999"],
        ),
        ("refuses", ["does not answer the first request", "no such model"]),
        ("none", ["vLLM writes no features"]),
        ("fewer", ["other hidden states than were requested", "[3, 3, 1]", "[3, 4] and the hidden size"]),
    ],
)
def test_an_engine_that_gives_no_features_is_ended(
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    said: list[str],
) -> None:
    monkeypatch.setenv("FAULT", fault)
    port = _free_port()
    asked = [*TARGET, "--exchange", str(tmp_path / "x"), "--vllm", str(program), "--port", str(port), "--quiet"]
    assert main(["serve", *asked]) == 2
    out, err = capsys.readouterr()
    assert "answers at" not in out
    assert [part for part in said if part not in err] == [], err
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0
