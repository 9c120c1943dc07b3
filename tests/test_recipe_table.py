"""tests/benchmarks/recipes.py: equal compute in steps, shared stages, runs that are kept, paired differences."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from deepspec_core.config.load import load_run_file
from deepspec_core.config.render import render
from deepspec_core.plugins.discovery import load_plugins

BENCHMARKS = Path(__file__).parent / "benchmarks"
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("recipes")


@pytest.fixture
def levers(recipes: Any) -> Any:
    return sys.modules["recipe_levers"]


def test_every_row_is_a_valid_run(recipes: Any, levers: Any) -> None:
    """Every lever's keys exist for each of its drafters, and change something."""
    plugins = load_plugins()
    names = levers.rows()
    assert len(names) == len(set(names)) > 60
    for row in names:
        path = levers.run_file(row)
        changed = load_run_file(path, overrides=levers.settings(row, 942), plugins=plugins)
        published = load_run_file(path, plugins=plugins)
        assert (changed == published) == (row in levers.DRAFTERS), row


def test_a_lever_that_changes_nothing_is_refused(recipes: Any, tmp_path: Path) -> None:
    """A recommended recipe is no published one."""
    text = (EXAMPLES / "recipes" / "recommended" / "dspark.toml").read_text()
    (tmp_path / "dspark.toml").write_text(text)
    (tmp_path / "dflash.toml").write_text(text)
    common = ["--output", str(tmp_path / "runs"), "--run-files", str(tmp_path), "--plan", "--only"]
    with pytest.raises(SystemExit, match="muon changes nothing"):
        recipes.main([*common, "dspark+lr2", "dspark+muon"])
    with pytest.raises(SystemExit, match="is of the draft type dspark, not dflash"):
        recipes.main([*common, "dflash"])


def test_another_call_has_the_same_ruler(recipes: Any, tmp_path: Path) -> None:
    """From its beginning on: the file is there before the first run is."""

    def ruler(prompts: int) -> Any:
        return argparse.Namespace(as_json=lambda: {"prompts": prompts})

    recipes.begin(tmp_path / "recipes.json", ruler(4))
    recipes.begin(tmp_path / "recipes.json", ruler(4))
    with pytest.raises(SystemExit, match="prompts 4 and 40"):
        recipes.begin(tmp_path / "recipes.json", ruler(40))
    assert [path.name for path in tmp_path.iterdir()] == ["recipes.json"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ([], ""),
        (["train.max_steps=7"], r"\[train\] \(7 steps, now 5\)"),
        (["draft.num_layers=2"], r"\[draft\]: choose"),
    ],
)
def test_a_run_with_other_settings_is_refused_before_anything_runs(
    recipes: Any, levers: Any, tmp_path: Path, changed: list[str], said: str
) -> None:
    """As after an edit of the quickstart, of a lever or of what estimate counts."""
    plugins = load_plugins()
    options = argparse.Namespace(
        reference="dflash", steps=5, tokens=40, prompts=3, threads=1, overrides=[], run_files=levers.QUICKSTART
    )
    ruler = recipes.Ruler(plugins, options)
    folder = tmp_path / "moved" / "dflash-seed42"
    folder.mkdir(parents=True)
    settings = [*ruler.settings("dflash", tmp_path / "where-it-was", 42), *changed]
    made = load_run_file(levers.run_file("dflash"), overrides=settings, plugins=plugins)
    (folder / "config.toml").write_text(render(made))
    (folder / "metrics.json").touch()
    if not said:
        ruler.require_same("dflash", folder, 42)
        return
    with pytest.raises(SystemExit, match=rf"dflash-seed42 was made with other settings in {said}"):
        recipes.finished(folder.parent, ruler)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "train.max_steps=3"], "--set train.max_steps: the comparison sets it itself"),
        (["--set", "train.optimizer=muon", "--only", "dspark+muon"], "muon changes nothing"),
        (["--against", "dspark"], "--against dspark: there is no finished run of seed 42"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(
    recipes: Any, tmp_path: Path, arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        recipes.main(["--output", str(tmp_path), "--seeds", "42", "--only", "dflash", *arguments])
    assert not list(tmp_path.glob("*-seed*"))


def test_a_lever_overrules_what_all_rows_start_from(recipes: Any, levers: Any, tmp_path: Path) -> None:
    options = argparse.Namespace(
        reference="dspark", steps=5, tokens=40, prompts=3, threads=1, overrides=["train.optimizer=adamw"],
        run_files=levers.QUICKSTART,
    )  # fmt: skip
    ruler, plugins = recipes.Ruler(load_plugins(), options), load_plugins()
    for row, optimizer in (("dspark", "adamw"), ("dspark+muon", "muon")):
        changed = ruler.settings(row, tmp_path / 'a "b"', 42)
        file = load_run_file(levers.run_file(row), overrides=changed, plugins=plugins)
        assert (file.train.optimizer, str(file.run.output)) == (optimizer, str(tmp_path / 'a "b"'))
    assert ruler.steps("dspark+muon") < ruler.steps("dspark")


def test_edited_data_is_another_ruler(recipes: Any, levers: Any, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"turns": ["Say 1"]}\n{"turns": ["Say 2"]}\n')
    text = (EXAMPLES / "quickstart" / "dflash.toml").read_text()
    source = 'sources = [{path = "builtin:tiny-dialogues", limit = 2500}]'
    assert source in text
    (tmp_path / "dflash.toml").write_text(text.replace(source, 'sources = [{path = "data.jsonl"}]'))
    options = argparse.Namespace(
        reference="dflash", steps=5, tokens=40, prompts=3, threads=1, overrides=[], run_files=tmp_path
    )
    (tmp_path / "out").mkdir()
    recipes.begin(tmp_path / "out" / "recipes.json", recipes.Ruler(load_plugins(), options))
    recipes.begin(tmp_path / "out" / "recipes.json", recipes.Ruler(load_plugins(), options))
    data.write_text('{"turns": ["Say 1"]}\n')
    with pytest.raises(SystemExit, match="run_files"):
        recipes.begin(tmp_path / "out" / "recipes.json", recipes.Ruler(load_plugins(), options))


def test_a_damaged_table_is_told(recipes: Any, tmp_path: Path) -> None:
    (tmp_path / "recipes.json").write_text('{"ruler": {')
    with pytest.raises(SystemExit, match=r"recipes\.json is damaged"):
        recipes.same_ruler(tmp_path / "recipes.json", argparse.Namespace(as_json=dict))
    (tmp_path / "dflash-seed42-old").mkdir()
    (tmp_path / "dflash-seed42-old" / "metrics.json").touch()
    assert recipes.finished(tmp_path, None) == []


def test_a_killed_share_is_done_again(recipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's folder with its record but without its files would count as complete."""
    drafters, link = sys.modules["drafters"], os.link
    source, folder = tmp_path / "one" / "regenerate", tmp_path / "other"
    source.mkdir(parents=True)
    for name in ("conversations.jsonl", "stage.json"):
        (source / name).write_text(name)

    def killed(*paths: Any, **options: Any) -> None:
        link(*paths, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drafters.os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            drafters.share(source.parent, folder, ("regenerate",))
    assert not (folder / "regenerate").exists()
    drafters.share(source.parent, folder, ("regenerate",))
    assert sorted(path.name for path in folder.rglob("*")) == ["conversations.jsonl", "regenerate", "stage.json"]


@pytest.mark.parametrize("row", ["dflash+ce", "dspark+nothing", "medusa"])
def test_what_is_no_row_is_refused(levers: Any, row: str) -> None:
    with pytest.raises(SystemExit, match="there are"):
        levers.parts(row)


def test_terms_move_in_the_second_third_of_training(levers: Any) -> None:
    file = load_run_file(
        levers.run_file("dspark"), overrides=levers.settings("dspark+ce-tv", 300), plugins=load_plugins()
    )
    for term, first, last in (("ce", 1.0, 0.1), ("tv", 0.0, 0.9)):
        moving = file.loss.terms[term]
        assert (moving.start, moving.end, moving.after, moving.steps) == (first, last, 100, 100)


@pytest.mark.slow
def test_a_dearer_step_means_fewer_of_them(recipes: Any, levers: Any) -> None:
    options = argparse.Namespace(
        reference="dflash", steps=100, tokens=40, overrides=["draft.num_layers=1"], run_files=levers.QUICKSTART
    )
    ruler = recipes.Ruler(load_plugins(), options)
    assert ruler.steps("dflash") == 100
    for row in ("dflash+anchors8", "dflash+anchors32", "eagle3"):
        flops = ruler.flops(row)
        assert flops["features"] > 0, "the target's pass is counted"
        assert sum(flops.values()) * ruler.steps(row) == pytest.approx(ruler.budget, rel=0.01)
    assert ruler.steps("dflash+anchors32") < 100 < ruler.steps("dflash+anchors8")


@pytest.mark.parametrize("name", ["dflash", "dspark", "eagle3"])
def test_recommended_run_files_are_the_quickstart_with_what_init_recommends(name: str) -> None:
    plugins = load_plugins()
    quickstart = EXAMPLES / "quickstart" / f"{name}.toml"
    recipe = plugins.registry.get("draft", name).recommended
    assert recipe is not None
    changed = [f"draft.{key}={json.dumps(value)}" for key, value in recipe.options.items()]
    terms = recipe.loss.get("terms", {})
    changed += [f"loss.terms={{{', '.join(f'{term} = {value}' for term, value in terms.items())}}}"] if terms else []
    changed += [f"train.{key}={json.dumps(value)}" for key, value in recipe.train.items()]
    expected = load_run_file(quickstart, overrides=changed, plugins=plugins)
    found = load_run_file(EXAMPLES / "recipes" / "recommended" / f"{name}.toml", plugins=plugins)
    assert found.run.name == f"recommended-{name}"
    assert evolve(found, run=expected.run) == expected


@pytest.mark.slow
def test_the_table_row_by_row(recipes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        'data.sources=[{path = "builtin:tiny-dialogues", limit = 40}]', "regenerate.max_tokens=24",
        "evaluate.max_new_tokens=12", "evaluate.temperature=[0.0]", "train.trackers=[]", "draft.num_layers=1",
    ]  # fmt: skip
    common = ["--output", str(tmp_path), "--seeds", "42", "--steps", "4", "--prompts", "3"]
    common += [word for one in small for word in ("--set", one)]
    recipes.main([*common, "--only", "dflash", "dflash+anchors8"])
    first = json.loads((tmp_path / "recipes.json").read_text())
    assert [run["row"] for run in first["runs"]] == ["dflash", "dflash+anchors8"]
    folders = [tmp_path / f"{row}-seed42" for row in ("dflash", "dflash+anchors8")]
    answers = [folder / "regenerate" / "conversations.jsonl" for folder in folders]
    assert answers[0].stat().st_ino == answers[1].stat().st_ino, "the same answers, not made again"
    for run in first["runs"]:
        assert sum(run["flops"].values()) * run["steps"] == pytest.approx(first["ruler"]["flops"], rel=0.2)
        (result,) = run["results"]
        assert result["tokens_per_draft_second"] > 0
    capsys.readouterr()
    # Later another row, with other taps: the answers are the same, made again. Finished runs stay as they are.
    before = (tmp_path / "dflash-seed42" / "metrics.json").stat().st_mtime_ns
    recipes.main([*common, "--only", "dflash", "dflash+taps-late"])
    assert (tmp_path / "dflash-seed42" / "metrics.json").stat().st_mtime_ns == before
    late = tmp_path / "dflash+taps-late-seed42"
    assert (late / "regenerate" / "conversations.jsonl").read_bytes() == answers[0].read_bytes()
    assert (late / "regenerate" / "conversations.jsonl").stat().st_ino != answers[0].stat().st_ino
    found = json.loads((tmp_path / "recipes.json").read_text())
    assert [run["row"] for run in found["runs"]] == ["dflash", "dflash+anchors8", "dflash+taps-late"]
    assert [one["row"] for one in found["differences"]] == ["dflash+anchors8", "dflash+taps-late"]
    lengths = {run["row"]: run["results"][0]["acceptance_length"] for run in found["runs"]}
    for one in found["differences"]:
        assert one["ahead"] == pytest.approx(lengths[one["row"]] - lengths["dflash"])
        assert one["interval"][0] <= one["ahead"] <= one["interval"][1]
    table = capsys.readouterr().out
    assert "held-out, temperature 0:" in table
    assert len([line for line in table.splitlines() if line.startswith("| dflash")]) == 3
    recipes.main([*common, "--only", "dflash", "--against", "dflash+anchors8"])
    against = json.loads((tmp_path / "recipes.json").read_text())["differences"]
    assert [(one["row"], one["against"]) for one in against] == [
        ("dflash", "dflash+anchors8"),
        ("dflash+taps-late", "dflash+anchors8"),
    ]
    assert against[0]["ahead"] == pytest.approx(-found["differences"][0]["ahead"])
    with pytest.raises(SystemExit, match="another ruler"):
        recipes.main([*common, "--only", "dflash", "--tokens", "200"])
    # A folder of one's own run files is part of the ruler, by its contents.
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "dflash.toml").write_bytes((EXAMPLES / "quickstart" / "dflash.toml").read_bytes())
    with pytest.raises(SystemExit, match=r"another ruler.*dflash\.toml"):
        recipes.main([*common, "--only", "dflash", "--reference", "dflash", "--run-files", str(mine)])
