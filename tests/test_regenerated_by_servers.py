"""A run that regenerates through servers: as one that regenerates in process, and what it keeps of them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stand_in_server import StandIn, standing_in

from deepspec_core.cli.main import main
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.interface.models import Target

KEY = "tip-of-the-tongue"
# The smoke run's conversations, with short answers.
SETTINGS = ("regenerate.temperature=0", "regenerate.max_tokens=20", "data.max_bad_rows=0", "run.threads=1")


@pytest.fixture
def servers(target: Target) -> Iterator[list[StandIn]]:
    """Servers of the built-in target: one returns token ids, and one text."""
    stop_ids = target.architecture.stop_token_ids
    with standing_in(target.model, ChatTokenizer(target.tokenizer), stop_ids, "vllm", "transformers") as running:
        for server in running:
            server.model, server.key = "builtin:tiny-qwen3", KEY
        yield running


def _run(path: Path, *settings: str) -> int:
    overrides = [word for text in (*SETTINGS, *settings) for word in ("--set", text)]
    return main(["run", str(path), "--smoke", "--stages", "regenerate", *overrides])


def test_the_stage_is_that_of_one_process_and_keeps_no_secret(
    new_run_file: Callable[[Path], Path],
    servers: list[StandIn],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = new_run_file(tmp_path / "here"), new_run_file(tmp_path / "there")
    assert _run(here) == 0
    monkeypatch.setenv("SERVERS_KEY", KEY)
    settings = [f"regenerate.servers=[{servers[0].address!r}, {servers[1].address!r}]"]
    settings.append("regenerate.api_key_env='SERVERS_KEY'")
    assert _run(there, *settings) == 0
    (ours,) = here.parent.rglob("conversations.jsonl")
    (theirs,) = there.parent.rglob("conversations.jsonl")
    assert theirs.read_bytes() == ours.read_bytes()
    assert all(server.asked for server in servers)
    said = capsys.readouterr()
    kept = b"".join(path.read_bytes() for path in there.parent.rglob("*") if path.is_file())
    assert KEY.encode() not in kept
    assert KEY not in said.out + said.err
    # Which servers answered is no key of the results: with others, or without any, the stage is complete.
    assert _run(there) == 0
    assert "already complete" in capsys.readouterr().out
