"""[draft] tree: which drafts can, what it goes with, that only evaluation reads it, and what a report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import deepspec_core as ds
from deepspec_core.cli.main import main
from deepspec_core.errors import ConfigError

TREE = ("--set", "draft.tree={nodes=6}")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["evaluate.confidence_threshold=0.5"], ["trees carry no confidence", "evaluate.confidence_threshold"]),
        (['evaluate.calibration="fitted.json"'], ["trees carry no confidence", "evaluate.calibration"]),
        (["draft.tree={nodes=0}"], ["draft.tree.nodes"]),
        (["draft.tree={leaves=3}"], ["draft.tree.leaves", "nodes"]),
    ],
)
def test_what_a_tree_does_not_go_with(
    run_file: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: list[str]
) -> None:
    settings = [word for text in more for word in ("--set", text)]
    assert main(["config", "check", str(run_file), *TREE, *settings]) == 2
    error = capsys.readouterr().err
    for part in says:
        assert part in error


def test_a_draft_that_proposes_chains_is_refused_at_once(
    run_file: Path, drafts: dict[str, Path], target: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    chains = run_file.with_name("eagle3.toml")
    quickstart = Path(__file__).parents[1] / "examples" / "quickstart" / "eagle3.toml"
    chains.write_text(quickstart.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["config", "check", str(chains), *TREE]) == 2
    assert "drafts of type 'eagle3' propose no trees" in (error := capsys.readouterr().err)
    assert "dflash, dspark" in error
    # A checkpoint says of which type it is.
    named = ("--set", 'run.stages=["evaluate"]', "--set", f"evaluate.draft={json.dumps(str(drafts['eagle3']))}")
    assert main(["run", str(run_file), *TREE, *named]) == 2
    assert "drafts of type 'eagle3' propose no trees" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="propose no trees"):
        ds.load_draft(drafts["eagle3"], target, tree_nodes=6)
    with pytest.raises(ConfigError, match="nodes"):
        ds.load_draft(drafts["dflash"], target, tree_nodes=0)


@pytest.mark.slow
def test_a_trained_draft_is_evaluated_with_trees(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training is not touched by the key; evaluation is, and its report counts nodes and depths."""
    small = ("evaluate.temperature=[0.0]", "evaluate.limit=2", "evaluate.max_new_tokens=16", "run.threads=1")
    command = ["run", str(finished_copy), "--smoke", *(word for text in small for word in ("--set", text)), *TREE]
    assert main(command) == 2
    assert "`draft.tree.nodes` changed after the stage `evaluate`" in capsys.readouterr().err
    assert main([*command, "--force", "evaluate"]) == 0
    assert "train: already complete" in capsys.readouterr().out
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    report = json.loads((folder / "metrics.json").read_text())
    assert report["settings"]["tree_nodes"] == 6
    for result in report["results"]:
        assert result["draft_tokens_per_proposal"] == 6
        assert len(result["marginal"]) <= 5, "the depths of a block of five"
        assert result["mismatches"] == []
    # Again does nothing, and without the key the chains' results would be others.
    assert main(command) == 0
    assert main(command[: -len(TREE)]) == 2


@pytest.mark.slow
def test_trees_beside_chains_in_one_table(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the run's folder. The run file of the folder stays as it was."""
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    saved = (folder / "config.toml").read_text()
    assert main(["compare", str(folder), "--with", "tree:6"]) == 0
    rows = json.loads((folder / "compare" / "comparison.json").read_text())["rows"]
    assert {row["run"] for row in rows} == {"quickstart-dflash", "tree:6"}
    report = json.loads((folder / "compare" / "tree_6" / "metrics.json").read_text())
    assert report["settings"]["tree_nodes"] == 6
    assert all(row["ahead"] is not None and row["comparable"] for row in rows if row["run"] == "tree:6")
    assert (folder / "config.toml").read_text() == saved
    capsys.readouterr()
    assert main(["compare", str(folder), "--with", "tree:6"]) == 0
    assert capsys.readouterr().out.count("already complete") == 2
    for wrong in ("tree", "tree:0", "tree:x"):
        assert main(["compare", str(folder), "--with", wrong]) == 2
        assert "tree:N" in capsys.readouterr().err
    changed = ["compare", str(folder), "--with", "tree:6", "--set", "evaluate.max_new_tokens=8"]
    assert main(changed) == 2
    assert "--force evaluate" in capsys.readouterr().err
    assert main([*changed, "--force", "evaluate"]) == 0


def test_greedy_answers_are_the_same_from_python_and_the_command_line(
    drafts: dict[str, Path], target: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"max_new_tokens": 12}
    [plain] = ds.generate(target, None, "What is 17 + 25?", **asked)
    draft = ds.load_draft(drafts["dspark"], target, tree_nodes=9)
    assert "of a tree of 9" in repr(draft)
    [fast] = ds.generate(target, draft, "What is 17 + 25?", **asked)
    assert fast.ids == plain.ids
    words = ["--target", "builtin:tiny-qwen3", "--draft", str(drafts["dspark"]), "--tree-nodes", "9", "--no-plain"]
    assert main(["generate", *words, "--max-new-tokens", "12", "--json", "What is 17 + 25?"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == plain.text
    with pytest.raises(ConfigError, match="no confidence"):
        ds.generate(target, draft, "What is 17 + 25?", confidence_threshold=0.5)
