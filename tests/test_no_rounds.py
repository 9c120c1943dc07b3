"""An evaluation in which every answer ends at its first token: there is no round, so there is no accepted length."""

import json
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from jsonschema import Draft202012Validator

import deepspec_core as ds
from deepspec_core.cli.main import main
from deepspec_core.evaluation.metrics_file import schema
from deepspec_core.families.transformers_target import TransformersTarget
from deepspec_core.interface.models import Target

TARGET = "builtin:tiny-qwen3"


@pytest.fixture(autouse=True)
def task(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two prompts, whose answers are a stop token each."""
    decode, stop_id = TransformersTarget.decode, target.architecture.stop_token_ids[0]

    def ending(*arguments: Any, **options: Any) -> Any:
        step = decode(*arguments, **options)
        logits = step.logits.clone()
        logits[..., stop_id] = 1e9
        return evolve(step, logits=logits)

    monkeypatch.setattr(TransformersTarget, "decode", ending)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"turns": [f"What is {n}?"]}) + "\n" for n in range(2)))
    return path


def test_nothing_says_an_accepted_length_of_0(drafts: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--draft", str(drafts["dflash"]), "--target", TARGET, "--temperature", "0"]
    assert main([*command, "--task", "task.jsonl", "--max-new-tokens", "4", "--out", "run"]) == 0
    assert "accepted length on task.jsonl at T=0 unknown (no rounds)" in capsys.readouterr().out
    report = json.loads(Path("run/metrics.json").read_text())
    assert list(Draft202012Validator(schema()).iter_errors(report)) == []
    (result,) = report["results"]
    assert (result["samples"], result["rounds"]) == (2, 0)
    assert result["acceptance_length"] is result["acceptance_length_interval"] is None
    assert result["draft_tokens_per_proposal"] is result["verify_rate"] is None
    result["rounds"] = 1
    assert not Draft202012Validator(schema()).is_valid(report), "where there was a round, there is an accepted length"
    assert main(["report", "run", "run", "--html", "page.html"]) == 0
    assert main(["report", "run", "--latex"]) == 0
    assert main(["status", "run"]) == 0
    shown = capsys.readouterr()
    assert "accepted length none" in shown.out
    assert "Traceback" not in shown.err
    for text in (shown.out, Path("run/report.md").read_text(), Path("page.html").read_text()):
        assert "0.00 (" not in text


def test_nor_does_python(target: Target, drafts: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    draft = ds.load_draft(str(drafts["dflash"]), target)
    (found,) = ds.evaluate(target, draft, "task.jsonl", temperature=0, max_new_tokens=4)
    assert found.accepted_length is found.accepted_length_interval is None
    assert main(["generate", "--target", TARGET, "--draft", str(drafts["dflash"]), "Hi"]) == 0
    seen = capsys.readouterr()
    assert "0 rounds, accepted length -" in seen.out + seen.err
