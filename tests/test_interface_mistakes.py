"""What a caller of the Python interface may get wrong is a DeepSpecError that names the argument, never a raw error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepspec_core as ds
from deepspec_core.cli.main import main
from deepspec_core.errors import ConfigError
from deepspec_core.evaluation.metrics_file import read_metrics

SURROGATE = "\udc80"
_HOLDS_ITSELF: dict[str, Any] = {}
_HOLDS_ITSELF["run"] = _HOLDS_ITSELF


@pytest.fixture(scope="module")
def target() -> Any:
    return ds.load_target("builtin:tiny-qwen3")


@pytest.fixture(scope="module")
def folder(finished: Path) -> Path:
    return finished.parent / "runs" / "quickstart-dflash-smoke"


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        (np.array(3), {}, "neither a prompt nor a list of prompts"),
        (None, {}, "neither a prompt nor a list of prompts"),
        ([np.array(3)], {}, "this is not a prompt"),
        (SURROGATE, {}, "not valid Unicode"),
        ("x", {"system_prompt": SURROGATE}, "not valid Unicode"),
        ([[{"role": "tool", "content": "x", "name": SURROGATE}]], {}, "not valid Unicode"),
        ("x", {"on_round": 3}, "on_round"),
        ("x", {"confidence_threshold": 0.5}, "a confidence threshold needs a draft"),
        ("x", {"temperature": 1e-30}, "0 for greedy decoding"),
        ("x", {"max_new_tokens": 10**12}, "max_new_tokens"),
    ],
)
def test_generate(target: Any, prompts: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ds.DeepSpecError, match=says):
        ds.generate(target, None, prompts, **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize("value", ["no", 0])
def test_answers_that_are_neither_true_nor_false(target: Any, folder: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match="`trust_remote_code`"):
        ds.load_target("builtin:tiny-qwen3", trust_remote_code=value)
    with pytest.raises(ConfigError, match="`smoke`"):
        ds.train(folder.parents[1] / "train.toml", smoke=value)
    for option in ("thinking", "plain"):
        with pytest.raises(ConfigError, match=option):
            ds.evaluate(target, ds.load_draft(folder / "draft", target), {"own": ["x"]}, **{option: value})


@pytest.mark.parametrize("name", ["", None, 3, "a\0b", "a" * 5000, "./" + "a" * 5000])
def test_names_of_models(target: Any, name: Any) -> None:
    with pytest.raises(ds.DeepSpecError):
        ds.load_target(name)
    with pytest.raises(ds.DeepSpecError):
        ds.load_draft(name, target)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ds.train(None),  # type: ignore[arg-type]
        lambda: ds.train(3),  # type: ignore[arg-type]
        lambda: ds.train(""),
        lambda: ds.train("run.toml", stages="train"),
        lambda: ds.train("run.toml", stages=3),  # type: ignore[arg-type]
        lambda: ds.train("run.toml", force=None),  # type: ignore[arg-type]
        lambda: ds.train({"run": {}}, base=3),  # type: ignore[arg-type]
        lambda: ds.RunFile.from_dict({1: 2}),  # type: ignore[dict-item]
        lambda: ds.RunFile.from_dict({"run": {3: 4}}),
        lambda: ds.RunFile.from_dict(_HOLDS_ITSELF),
        lambda: ds.load_target("builtin:tiny-qwen3", device="meta"),
    ],
)
def test_runs(call: Callable[[], Any]) -> None:
    with pytest.raises(ds.DeepSpecError):
        call()


@pytest.mark.parametrize("tasks", [None, 3, {3: ["x"]}, [3], {"a": 3}])
def test_tasks(target: Any, folder: Path, tasks: Any) -> None:
    draft = ds.load_draft(folder / "draft", target)
    with pytest.raises(ds.DeepSpecError):
        ds.evaluate(target, draft, tasks, max_new_tokens=2)


def test_messages_speak_of_calls_and_not_of_run_files(
    target: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ds.DeepSpecError, match=r"the result of load_draft\(NAME, target\), or None$"):
        ds.generate(target, "dir", "x")  # type: ignore[arg-type]
    draft = ds.load_draft(folder / "draft", target)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ds.DeepSpecError) as caught:
        ds.evaluate(target, draft, "nope.jsonl")
    assert caught.value.fix == f"Relative paths start at {tmp_path}."
    with pytest.raises(ds.DeepSpecError) as caught:
        ds.load_target(".")
    assert caught.value.fix == "Name the folder that holds config.json and the safetensors files."


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"results": 3}', "[" * 10**5, None])
def test_a_damaged_report_is_one_message(
    folder: Path, tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((folder / "metrics.json").read_text())
    assert read_metrics(folder / "metrics.json") == content
    if text is None:
        del content["results"][0]["marginal"]
    (tmp_path / "metrics.json").write_text(json.dumps(content) if text is None else text)
    assert main(["report", str(tmp_path)]) == 2
    seen = capsys.readouterr().err
    assert "metrics.json" in seen
    assert "Traceback" not in seen


@pytest.mark.slow
def test_a_damaged_journal_is_one_message(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke" / "evaluate"
    record = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({**record, "complete": False}))
    journal = folder / "held-out-t0.jsonl"
    good = journal.read_text().splitlines()
    changed = json.loads(good[1])
    changed["completions"][0]["rounds"][0]["acceptance_length"] = "many"
    other = json.loads(good[1])
    other["completions"][0]["id"] = "another"
    for line, says in [
        ("3", "no object"),
        (json.dumps(changed), "numbers that are none"),
        (json.dumps(other), "other prompts"),
    ]:
        journal.write_text("\n".join([good[0], line, *good[2:]]) + "\n")
        assert main(["run", str(finished_copy), "--smoke", "--set", "run.threads=1"]) == 2
        seen = capsys.readouterr().err
        assert says in seen, seen
        assert "held-out-t0.jsonl:2" in seen
        assert "Traceback" not in seen
    journal.write_text("\n".join(good[:2]) + "\n" + good[2][:50])
    assert main(["run", str(finished_copy), "--smoke", "--set", "run.threads=1"]) == 0
