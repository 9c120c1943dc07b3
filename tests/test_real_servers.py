"""A run that regenerates through real servers: two of `transformers serve`, one of them killed on the way, and vLLM."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_process import serving_transformers, serving_vllm

from deepspec_core.cli.main import main
from deepspec_core.interface.models import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

Rows = list[dict[str, Any]]
COUNT = 120


def _regenerated(path: Path, *settings: str) -> tuple[Rows, dict[str, Any]]:
    """The conversations and the stage's summary of a run."""
    overrides = [
        'data.sources=[{path="builtin:tiny-dialogues", limit=' + str(COUNT) + "}]",
        "regenerate.temperature=0.0",
    ]
    words = [word for text in (*overrides, *settings) for word in ("--set", text)]
    assert main(["run", str(path), "--stages", "regenerate", *words]) == 0
    (file,) = path.parent.rglob("conversations.jsonl")
    record = json.loads((file.parent / "stage.json").read_text())
    return [json.loads(line) for line in file.read_text().splitlines()], record["summary"]


@pytest.fixture(scope="module")
def here(new_run_file: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Answered in this process."""
    return _regenerated(new_run_file(tmp_path_factory.mktemp("here")))[0]


@pytest.fixture(scope="module")
def folder(target: Target) -> Path:
    """Of the built-in target."""
    return Path(target.plugins.registry.load("builtin", "tiny-qwen3")())


def _alike(rows: Rows, here: Rows) -> float:
    """The share of conversations that are the same. Kernels round differently, so a close choice may fall otherwise."""
    assert [row["id"] for row in rows] == [row["id"] for row in here]
    return sum(row == other for row, other in zip(rows, here, strict=True)) / len(here)


def test_two_of_transformers_serve_and_one_is_killed_and_restarted(
    run_file: Path, folder: Path, here: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = run_file.parent / "runs" / "quickstart-dflash" / "regenerate" / "conversations.jsonl.partial"

    def lines() -> int:
        return len(partial.read_bytes().splitlines()) if partial.exists() else 0

    with (
        serving_transformers(folder, tmp_path / "first.log") as first,
        serving_transformers(folder, tmp_path / "second.log") as second,
    ):

        def kill_and_restart() -> None:
            while lines() < COUNT // 10:
                time.sleep(0.01)
            first.kill()
            first.start()

        helper = threading.Thread(target=kill_and_restart, daemon=True)
        helper.start()
        servers = f"regenerate.servers=['{first.address}/v1', '{second.address}/v1']"
        rows, summary = _regenerated(run_file, servers)
        helper.join()
    said = capsys.readouterr().err
    assert f"{first.address}/v1 is out" in said
    assert f"{first.address}/v1 is in again" in said
    print(f"alike: {_alike(rows, here):.3f}", summary)  # noqa: T201
    assert _alike(rows, here) > 0.95
    assert summary["failures"] == 0


def test_vllm_returns_the_token_ids(run_file: Path, folder: Path, here: Rows, tmp_path: Path) -> None:
    with serving_vllm(folder, tmp_path / "vllm.log") as server:
        rows, summary = _regenerated(run_file, f"regenerate.servers=['{server.address}/v1']")
        print(f"alike: {_alike(rows, here):.3f}", summary)  # noqa: T201
        assert _alike(rows, here) > 0.95
        assert summary["failures"] == summary["mismatched_answers"] == 0
        sampled = run_file.parent / "sampled"
        sampled.mkdir()
        other = sampled / run_file.name
        other.write_text(run_file.read_text())
        settings = ["regenerate.temperature=0.9", "regenerate.top_k=20", "regenerate.min_p=0.05"]
        drawn, summary = _regenerated(other, f"regenerate.servers=['{server.address}/v1']", *settings)
    assert summary["failures"] == 0
    assert _alike(drawn, here) < 0.5
