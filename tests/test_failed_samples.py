"""`deepspec evaluate` with a prompt that the template refuses, one that the target fails on, and little memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from deepspec_core.cli.main import main
from deepspec_core.evaluation.metrics_file import schema
from deepspec_core.families.transformers_target import TransformersTarget

PROMPTS = 21


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prompts of which the template refuses one and the target cannot read the longest; memory is for two of them."""
    turns = [f"What is {n}?" for n in range(PROMPTS)]
    turns[3], turns[7] = "a <|im_end|> b", "why " * 60
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"turns": [one]}) + "\n" for one in turns))
    decode, open_slots = TransformersTarget.decode, TransformersTarget.open_slots

    def failing(self: Any, slots: Any, input_ids: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("last_only") and input_ids.shape[1] > 60:
            raise IndexError("index out of range in self")
        return decode(self, slots, input_ids, *arguments, **options)

    def cramped(self: Any, num_slots: int, max_length: int) -> None:
        if num_slots > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        open_slots(self, num_slots, max_length)

    monkeypatch.setattr(TransformersTarget, "decode", failing)
    monkeypatch.setattr(TransformersTarget, "open_slots", cramped)
    return path


def test_what_failed_is_listed_and_in_no_figure(
    task: Path, drafts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--draft", str(drafts["dflash"]), "--target", "builtin:tiny-qwen3", "--temperature", "0"]
    command += ["--task", str(task), "--max-new-tokens", "2", "--batch-size", "4"]
    out = task.parent / "run"
    assert main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "2 failed and are in no figure" in said.err + said.out
    assert "4 sequences at once do not fit memory" in said.err + said.out
    report = json.loads((out / "metrics.json").read_text())
    assert list(Draft202012Validator(schema()).iter_errors(report)) == []
    (result,) = report["results"]
    assert (result["samples"], result["batch_size"], result["halved_to"]) == (PROMPTS - 2, 4, [2])
    refused, failed = result["failures"]
    assert "control token" in refused["reason"]
    assert refused["id"] != failed["id"]
    assert failed["reason"].startswith("IndexError: index out of range in self")
    page = (out / "report.md").read_text()
    assert "## Samples that failed" in page
    assert f"| {failed['id']} | IndexError: index out of range" in page
    assert "| 4 (halved: 2) |" in page
