"""The quickstart as the README runs it, whole: what it promises must come out. Minutes long."""

import json
from pathlib import Path

import pytest

from deepspec_core.cli.main import run_main

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "train.toml"


@pytest.mark.slow
def test_the_quickstart_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file, folder = tmp_path / "train.toml", tmp_path / "runs" / "quickstart"
    run_file.write_text(QUICKSTART.read_text().replace("../../runs/", "runs/"))
    assert run_main([str(run_file)]) == 0
    results = {result["temperature"]: result for result in json.loads((folder / "metrics.json").read_text())["results"]}
    assert results[0.0]["acceptance_length"] >= 3.5
    assert results[1.0]["acceptance_length"] >= 3.0
    assert results[0.0]["mismatches"] == []
    trained = {json.loads(line)["id"] for line in (folder / "regenerate" / "conversations.jsonl").open()}
    evaluated = {
        completion["id"]
        for journal in (folder / "evaluate").glob("*.jsonl")
        for line in journal.open()
        for completion in json.loads(line).get("completions", [])
    }
    assert len(evaluated) >= 40
    assert not trained & evaluated
    capsys.readouterr()
    assert run_main([str(run_file)]) == 0
    assert "nothing to do" in capsys.readouterr().out
