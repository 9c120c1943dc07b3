"""[evaluate] batch_size with several sizes: results of each, journals apart, throughput in the tables and the page."""

import json
from pathlib import Path

import pytest

from deepspec_core.cli.main import main
from deepspec_core.evaluation.evaluator import recorded
from deepspec_core.pipeline.evaluating import journal_of


@pytest.fixture(scope="module")
def evaluated(drafts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a greedy evaluation at batch sizes 1 and 3."""
    folder = tmp_path_factory.mktemp("sizes")
    (folder / "task.jsonl").write_text("".join(json.dumps({"turns": [f"What is {n}?"]}) + "\n" for n in range(5)))
    command = ["evaluate", "--draft", str(drafts["dspark"]), "--target", "builtin:tiny-qwen3", "--temperature", "0"]
    command += ["--task", str(folder / "task.jsonl"), "--max-new-tokens", "6", "--batch-size", "1", "--batch-size", "3"]
    assert main([*command, "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_results_and_journals_of_each_size(evaluated: Path) -> None:
    results = json.loads((evaluated / "metrics.json").read_text())["results"]
    assert [one["batch_size"] for one in results] == [1, 3]
    assert all(one["speedup"] > 0 for one in results)
    journals = [journal_of(evaluated, one) for one in results]
    assert [path.name for path in journals] == ["task-t0-b1.jsonl", "task-t0-b3.jsonl"]
    outputs = [
        {done.id: done.output_ids for group in recorded(path)[1] for done in group.completions} for path in journals
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 5


def test_tables_and_page_have_each_size(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["report", str(evaluated), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["batch_size"] for row in rows] == [1, 3]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert "Throughput by batch size" in page
    text = (evaluated / "report.md").read_text()
    figures, time = text.split("## Where the time goes")
    assert ".jsonl | 0 | 3 | 5 | " in figures
    assert ".jsonl | 0 | 3 | " in time
    assert "batch 3: 5 of 5 outputs equal plain greedy decoding" in text


def test_rounds_are_read_at_one_size(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(evaluated)]) == 0
    fitted = json.loads((evaluated / "calibration.json").read_text())["fitted_on"]
    assert fitted["samples"] == 5


@pytest.mark.parametrize("sizes", ["[]", "[2, 2]", "[0]", '"2"', "[1.5]"])
def test_sizes_that_are_none(run_file: Path, sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(run_file), "--dry-run", "--set", f"evaluate.batch_size={sizes}"]) == 2
    assert "evaluate.batch_size" in capsys.readouterr().err
