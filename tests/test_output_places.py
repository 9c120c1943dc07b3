"""What stands where a run writes is said before the first stage, or is removed where it is the run's own rest."""

from pathlib import Path

import pytest

from deepspec_core.cli.main import main
from deepspec_core.pipeline.training import publish


@pytest.mark.parametrize(
    "name",
    [
        ".lock",
        "config.toml",
        "regenerate/stage.json",
        "cache/stage.json",
        "train/stage.json.partial",
        "evaluate/stage.json",
        "regenerate/conversations.jsonl",
        "regenerate/conversations.jsonl.partial",
        "regenerate/conversations.jsonl.ordered",
        "regenerate/conversations.jsonl.failures.jsonl",
        "cache/.lock",
        "train/metrics.jsonl",
        "metrics.json",
        "report.md",
        "report.md.partial",
        "report.html",
        "evaluate/samples.json",
        "evaluate/held-out-t0.jsonl",
        "tokens/manifest.json",
    ],
)
def test_a_folder_where_a_file_belongs(run_file: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    place = run_file.parent / "runs" / "quickstart-dflash-smoke" / name
    place.mkdir(parents=True)
    assert main(["run", str(run_file), "--smoke"]) == 2
    seen = capsys.readouterr()
    assert "starting" not in seen.out
    assert "A folder has the name of a file of the run" in seen.err
    assert str(place) in seen.err


def test_the_names_are_those_that_a_run_writes(finished: Path) -> None:
    """Every file that a run leaves in its folder and its stages' folders is in the table, a journal, or the cache's."""
    from deepspec_core.pipeline import places

    out = finished.parent / "runs" / "quickstart-dflash-smoke"
    known = {
        *places._OF_EVERY_STAGE,
        *places._OF_TOKENS,
        *sum([*places._OF_STAGES.values(), *places._OF_RUNS.values()], ()),
    }
    left = [path for path in [*out.glob("*"), *out.glob("*/*")] if path.is_file() and path.parent.name != "draft"]
    own = ("evaluate/*-t*.jsonl", "cache/manifest.json", "cache/shard-*", "cache/writer.lock", "tokens/tokens-*.arrow")
    assert not {path.name for path in left if not any(map(path.match, own))} - known


@pytest.mark.parametrize("name", [".draft.partial", ".draft.old"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to nothing"])
def test_rests_of_a_draft_are_removed(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("new")
    (tmp_path / "other").mkdir()
    (tmp_path / "draft").mkdir()
    stale = tmp_path / name
    if kind == "file":
        stale.write_text("rest")
    elif kind == "folder":
        (stale / "inside").mkdir(parents=True)
    else:
        stale.symlink_to(tmp_path / ("other" if kind == "link" else "gone"))
    publish(tmp_path / "checkpoint", tmp_path / "draft")
    assert (tmp_path / "draft" / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "draft", "other"]
