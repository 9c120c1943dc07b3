"""The quickstart as the README runs it, whole: what it promises must come out. Minutes long."""

import json
from pathlib import Path

import pytest

from deepspec_core.cli.main import run_main


@pytest.mark.slow
def test_the_quickstart_keeps_its_promises(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main([str(run_file)]) == 0
    folder = run_file.parent / "runs" / "quickstart-dflash"
    results = {result["temperature"]: result for result in json.loads((folder / "metrics.json").read_text())["results"]}
    assert results[0.0]["acceptance_length"] >= 2.5
    assert results[1.0]["acceptance_length"] >= 1.8
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
