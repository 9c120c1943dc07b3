"""A cache is read whole before a stage believes what another process wrote, and when the user asks."""

import json
import shutil
from pathlib import Path

import pytest

from deepspec_core.cache.manifest_digest import sealed
from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.smoke import smoke as made_small
from deepspec_core.plugins.discovery import load_plugins


@pytest.fixture
def cache(finished_copy: Path) -> Path:
    return finished_copy.parent / "runs" / "quickstart-dflash-smoke" / "cache"


def _flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    begin = int(len(content) * place)
    content[begin : begin + 20] = bytes(255 - byte for byte in content[begin : begin + 20])
    path.write_bytes(content)


def _train(run_file: Path, *more: str) -> int:
    return main(["run", str(run_file), "--smoke", "--stages", "train", "--force", "train", *more])


def test_training_refuses_flipped_bytes(finished_copy: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(finished_copy) == 0
    _flip(cache / "shard-00000.h5")
    capsys.readouterr()
    assert _train(finished_copy) == 2
    seen = capsys.readouterr().err
    assert "A shard of the cache is damaged" in seen
    assert "shard-00000.h5" in seen
    assert "train: 1" not in seen


def test_training_refuses_an_edited_manifest(
    finished_copy: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of an earlier version has no digest: a stage that opens it says so, and goes on."""
    manifest = cache / "manifest.json"
    content = json.loads(manifest.read_text())
    ids = content["shards"][0]["ids"]
    ids[0], ids[1] = ids[1], ids[0]
    manifest.write_text(json.dumps(content))
    assert _train(finished_copy) == 2
    assert "The cache's manifest has changed since it was written" in capsys.readouterr().err
    del content["digest"]
    manifest.write_text(json.dumps(content))
    plugins = load_plugins()
    overrides = (f"cache.path={json.dumps(str(cache))}", 'run.stages=["train"]')
    run_file = made_small(load_run_file(finished_copy, overrides=overrides, plugins=plugins))
    run = Run(file=run_file, path=finished_copy, plugins=plugins)
    assert len(run.cache.open()) == 16
    run.cache.let_go()
    assert "the manifest has no digest" in capsys.readouterr().err


def test_verify_says_that_all_is_well_or_names_every_damage(
    finished_copy: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "verify", str(cache)]) == 0
    assert "16 samples" in capsys.readouterr().out
    # Five samples a shard make four shards.
    run_file = finished_copy.parent / "small.toml"
    run_file.write_text(finished_copy.read_text().replace("[cache]", "[cache]\nshard_samples = 5"))
    again = ["run", str(run_file), "--smoke", "--stages", "cache", "--force", "cache"]
    assert main([*again, "--set", 'run.stages=["regenerate", "cache"]']) == 0
    _flip(cache / "shard-00000.h5", 0.2)
    (cache / "shard-00001.h5").unlink()
    (cache / "shard-00002.h5").write_bytes((cache / "shard-00002.h5").read_bytes()[:-1])
    shutil.copy(cache / "shard-00000.h5", tmp_path / "elsewhere.h5")
    (cache / "shard-00003.h5").rename(tmp_path / "real.h5")
    (cache / "shard-00003.h5").symlink_to(tmp_path / "real.h5")
    capsys.readouterr()
    assert main(["cache", "verify", str(cache)]) == 2
    seen = capsys.readouterr().err
    assert seen.count("Damaged:") == 4
    for number, word in enumerate(("checksum", "missing", "bytes", "missing")):
        part = next(text for text in seen.split("Damaged:") if f"shard-0000{number}" in text)
        assert word in part


def test_what_is_no_finished_cache_is_refused(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify", str(tmp_path)]) == 2
    assert "There is no cache" in capsys.readouterr().err
    assert list(tmp_path.glob(".lock")) == []
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(sealed({**manifest, "complete": False})))
    assert main(["cache", "verify", str(cache)]) == 2
    assert "The cache is unfinished" in capsys.readouterr().err
    assert main(["cache", "verify", str(cache), "--format", "hdf6"]) == 2
    assert "hdf5" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["damaged", "another", "gone", "unfinished"])
def test_a_cache_elsewhere_is_looked_at_before_the_first_stage(
    run_file: Path, cache: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = cache / "manifest.json"
    content = json.loads(manifest.read_text())
    stages = '["regenerate", "train"]' if what in ("gone", "unfinished") else '["regenerate", "cache", "train"]'
    if what == "damaged":
        manifest.write_text("{")
    elif what == "another":
        content["header"]["taps"] = [1]
    elif what == "gone":
        manifest.unlink()
    else:
        content["complete"] = False
    if what in ("another", "unfinished"):
        manifest.write_text(json.dumps(sealed(content)))
    (cache / "stage.json").unlink()
    options = ["--set", f"cache.path={json.dumps(str(cache))}", "--set", f"run.stages={stages}"]
    assert main(["run", str(run_file), "--smoke", *options]) == 2
    seen = capsys.readouterr()
    says = {"damaged": "manifest is damaged", "another": "made for another taps", "gone": "There is no cache"}
    assert says.get(what, "The cache is unfinished") in seen.err
    assert "starting" not in seen.out


def test_no_room_for_a_cache_is_said_before_the_first_stage(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deepspec_core.cache.estimate.free_bytes", lambda _path: 1000)
    assert main(["run", str(run_file), "--smoke"]) == 2
    seen = capsys.readouterr()
    assert "The disk has no room for the cache" in seen.err
    assert "starting" not in seen.out


def test_features_of_the_embedding_can_be_cached(run_file: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "it is said " * 9}]}
    (run_file.parent / "rows.jsonl").write_text(json.dumps(row) + "\n")
    command = ["run", str(run_file), "--smoke", "--set", 'run.stages=["cache", "train"]', "--set", "run.threads=1"]
    command += ["--set", 'data.sources=[{path="rows.jsonl"}]', "--set", "data.held_out=0.0"]
    assert main([*command, "--set", "target.layers=[-1, 4]"]) == 0
    manifest = json.loads(
        (run_file.parent / "runs" / "quickstart-dflash-smoke" / "cache" / "manifest.json").read_text()
    )
    assert manifest["header"]["taps"] == [-1, 4]


@pytest.mark.slow
def test_a_draft_with_fewer_taps_trains_from_a_cache_that_has_more(
    run_file: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished.parent / "runs" / "quickstart-dflash-smoke" / "cache", cache)
    (cache / "stage.json").unlink()
    asked = ["run", str(run_file), "--smoke", "--set", f"cache.path={json.dumps(str(cache))}"]
    asked += ["--set", 'run.stages=["train"]', "--set", "train.max_steps=2"]
    assert main([*asked, "--set", "target.layers=[4, 10]"]) == 0
    assert "the cache has taps [2, 4, 6, 8, 10]; this run reads [4, 10]" in capsys.readouterr().err
    assert main([*asked, "--force", "train", "--set", "target.layers=[3, 4]"]) == 2
    assert "made for another taps" in capsys.readouterr().err
