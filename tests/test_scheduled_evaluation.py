"""An evaluation whose proposals are cut by a cost table: greedy outputs stay, settings are told, misfits refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deepspec_core as ds
from deepspec_core.cli.main import main
from deepspec_core.decoding.engine import Completion
from deepspec_core.decoding.profiling import Step
from deepspec_core.digests import digest_of
from deepspec_core.errors import DeepSpecError
from deepspec_core.evaluation.cost_table import write_cost_table
from deepspec_core.evaluation.evaluator import recorded


def step(requests: int, tokens: int) -> Step:
    seconds = 1 + 0.2 * (tokens - requests)
    return Step(
        requests=requests, tokens=tokens, seconds=seconds, lower_quartile=seconds, upper_quartile=seconds, repeats=3
    )


@pytest.fixture
def costs(judged_copy: Path) -> Callable[..., str]:
    """costs(**changes): a cost table for the evaluation in `run`, some of it changed; its path."""
    report = json.loads((judged_copy / "metrics.json").read_text())
    most = report["draft"]["max_tokens"] + 1

    def make(*, sizes: tuple[int, ...] = (1, 3), most: int = most, machine: Any = None, **target: Any) -> str:
        about = {
            "target": {**{key: report["target"][key] for key in ("model", "revision", "dtype")}, **target},
            "machine": {**report["machine"], **(machine or {})},
        }
        steps = [step(size, size * width) for size in sizes for width in (1, most)]
        write_cost_table(judged_copy.parent / "costs.json", steps, about)
        return "costs.json"

    return make


def scheduled_file(text: str, *more: str) -> Path:
    """The run file of `run` with other lines for its [evaluate] and its output."""
    output = next(line for line in text.splitlines() if line.startswith("output"))
    lines = ["[evaluate]", *more, 'scheduler = {cost_table = "costs.json"}']
    Path("scheduled.toml").write_text(
        text.replace(output, 'output = "scheduled"').replace("[evaluate]", "\n".join(lines))
    )
    return Path("scheduled.toml")


def completions(folder: str) -> list[Completion]:
    (journal,) = Path(folder).glob("evaluate/*-t0.jsonl")
    return [completion for group in recorded(journal)[1] for completion in group.completions]


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_greedy_outputs_stay_and_the_report_says_how_they_came(
    judged_copy: Path, drafts: dict[str, Path], costs: Callable[..., str], asynchronous: bool
) -> None:
    task = judged_copy.parent / "task.jsonl"
    task.write_text("".join(json.dumps({"turns": [f"What is {n} + {n + 1}?"]}) + "\n" for n in range(6)))
    asked = ["evaluate", "--draft", str(drafts["dspark"]), "--target", "builtin:tiny-qwen3", "--task", "task.jsonl"]
    small = ["--temperature", "0", "--max-new-tokens", "12", "--batch-size", "3", "--out", "scheduled"]
    more = ["--asynchronous"] if asynchronous else []
    command = [*asked, *small, "--cost-table", costs(), *more]
    assert main(command) == 0
    before, found = completions("run"), completions("scheduled")
    assert [one.output_ids for one in before] == [one.output_ids for one in found]
    lengths = [{r.proposal_length for one in several for r in one.rounds} for several in (before, found)]
    assert min(lengths[1]) < min(lengths[0]), "some proposals were cut"
    report = json.loads(Path("scheduled/metrics.json").read_text())
    assert report["settings"]["scheduler"] == ("asynchronous" if asynchronous else "synchronous")
    assert report["settings"]["cost_table"] == digest_of(Path("costs.json"))
    assert "confidence" not in report["results"][0]
    assert "a scheduler cut the proposals" in Path("scheduled/report.md").read_text()
    # Another table, or the other form, under finished results is noticed.
    if not asynchronous:
        assert main([*command, "--asynchronous"]) == 2
        costs(sizes=(1, 2, 3))
        assert main(command) == 2
        assert main(["calibrate", "scheduled"]) == 2


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"revision": "0" * 64}, ("is of another target", "deepspec profile")),
        ({"dtype": "float16"}, ("in another number format",)),
        ({"machine": {"device": "NVIDIA H200"}}, ("another kind of machine", "NVIDIA H200")),
        ({"sizes": (2, 3)}, ("no step of so many requests", "--batch-size 1 --batch-size 3")),
        ({"sizes": (1, 2)}, ("no step of so many requests", "--batch-size 3")),
        ({"most": 2}, ("no step of so many tokens", "--draft-tokens")),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_the_first_stage(
    judged_copy: Path,
    costs: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    parts: tuple[str, ...],
) -> None:
    costs(**changes)
    path = scheduled_file((judged_copy / "config.toml").read_text())
    assert main(["run", str(path)]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in parts:
        assert part in message, message
    assert not Path("scheduled/evaluate").exists()


def test_what_does_not_go_with_a_scheduler_is_refused(
    judged_copy: Path, drafts: dict[str, Path], costs: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", "--draft", str(drafts["dflash"]), "--target", "builtin:tiny-qwen3", "--task", "t.jsonl"]
    assert main([*asked, "--cost-table", costs()]) == 2
    assert "gives no confidence to schedule by" in capsys.readouterr().err
    path = scheduled_file((judged_copy / "config.toml").read_text().replace("confidence_threshold = 0.0", ""))
    for more, says in (
        (["evaluate.confidence_threshold=0.5"], "cannot be used together"),
        (["draft.tree.nodes=4"], "trees carry no confidence"),
        (["evaluate.scheduler.cost_table=none.json"], "the cost table is missing"),
    ):
        assert main(["run", str(path), *(part for one in more for part in ("--set", one))]) == 2
        assert says in capsys.readouterr().err


def test_from_python_too(
    judged_copy: Path, drafts: dict[str, Path], costs: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    target = ds.load_target("builtin:tiny-qwen3", dtype="float32", device="cpu")
    draft = ds.load_draft(drafts["dspark"], target)
    asked: dict[str, Any] = {"tasks": {"sums": ["What is 3 + 4?", "What is 5 + 6?"]}, "temperature": 0.0}
    asked |= {"max_new_tokens": 8, "batch_size": 1, "plain": False}
    [free] = ds.evaluate(target, draft, **asked)
    [found] = ds.evaluate(target, draft, cost_table=costs(), **asked)
    assert found.figures["output_tokens"] == free.figures["output_tokens"]
    assert found.figures["scheduler"] == "synchronous"
    assert found.figures["cost_table"] == digest_of(Path("costs.json"))
    assert "threads" not in caplog.text
    ds.evaluate(target, draft, cost_table=costs(machine={"threads": 77}), asynchronous=True, **asked)
    assert "costs.json was measured with 77 threads, but this evaluation uses 1" in caplog.text
    with pytest.raises(DeepSpecError, match="is of another target"):
        ds.evaluate(target, draft, cost_table=costs(revision="0" * 64), **asked)
    with pytest.raises(DeepSpecError, match="cannot be used together"):
        ds.evaluate(target, draft, cost_table=costs(), confidence_threshold=0.5, **asked)
    with pytest.raises(DeepSpecError, match="asynchronous is an option of the scheduler"):
        ds.evaluate(target, draft, asynchronous=True, **asked)
