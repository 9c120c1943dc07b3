"""What a finished stage left is what the next one reads, and an interrupted stage says what it went on with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.errors import CacheError, DataError, StageError
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.running import do
from deepspec_core.pipeline.smoke import smoke as made_small
from deepspec_core.pipeline.stages import plan
from deepspec_core.plugins.discovery import Plugins, load_plugins
from deepspec_core.targets.opening import resolve_model

ONE_THREAD = ("--set", "run.threads=1")


def _folder(path: Path) -> Path:
    return path.parent / "runs" / "quickstart-dflash-smoke"


def test_a_draft_that_changed_after_training_is_not_evaluated(
    finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = _folder(finished_copy) / "draft" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-20] ^= 1
    weights.unlink()  # it may share its bytes with the checkpoint
    weights.write_bytes(content)
    assert main(["run", str(finished_copy), "--smoke", "--force", "evaluate"]) == 2
    seen = capsys.readouterr()
    assert "The run's finished draft changed after the stage `train`" in seen.err
    assert "discarded" not in seen.out


def test_answers_cut_before_the_next_stage_are_refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(run_file), "--smoke", *ONE_THREAD, "--stages"]
    assert main([*command, "regenerate"]) == 0
    path = _folder(run_file) / "regenerate" / "conversations.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert main([*command, "cache"]) == 2
    assert "The file of regenerated conversations changed after the stage" in capsys.readouterr().err


def test_answers_that_are_gone_are_told(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_folder(finished_copy) / "regenerate" / "conversations.jsonl").unlink()
    assert main(["run", str(finished_copy), "--smoke", "--force", "train"]) == 2
    said = capsys.readouterr().err
    assert "The regenerated conversations cannot be read" in said
    assert "--force regenerate" in said
    assert (_folder(finished_copy) / "draft").is_dir(), "what was to be made again is still there"


def test_a_stage_resumed_with_another_version_keeps_both(
    finished_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _folder(finished_copy) / "evaluate" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    versions = Plugins.versions
    monkeypatch.setattr(Plugins, "versions", lambda self: {**versions(self), "deepspec-dflash": "99"})
    assert main(["run", str(finished_copy), "--smoke", *ONE_THREAD]) == 0
    (old,) = {version for name, version in versions(load_plugins()).items() if name == "deepspec-dflash"}
    assert f"evaluate: resumed with deepspec-dflash 99, but started with {old}" in capsys.readouterr().err
    assert json.loads(record.read_text())["plugins"]["deepspec-dflash"] == f"{old}, then 99"


def test_a_source_written_while_it_is_read_is_refused(run_file: Path) -> None:
    rows = run_file.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"turns": [f"Say {number}"]}) + "\n" for number in range(20)))
    plugins = load_plugins()
    overrides = ('data.sources=[{path="rows.jsonl"}]', "data.held_out=0.0", 'run.stages=["regenerate"]')
    run = Run(file=load_run_file(run_file, overrides=overrides, plugins=plugins), path=run_file, plugins=plugins)
    assert len(list(run.data.conversations("train"))) == 20
    reading = run.data.conversations("train")
    next(reading)
    with rows.open("a") as file:
        file.write('{"turns": ["One more"]}\n')
    with pytest.raises(DataError, match="changed while it was read"):
        list(reading)


@pytest.mark.slow
def test_a_cache_of_another_split_is_not_evaluated_on_held_out_prompts(
    finished: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts that are held out here may be trained on there."""
    rows = run_file.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"turns": [f"Say {number}"]}) + "\n" for number in range(40)))
    cache = _folder(finished) / "cache"
    command = ["run", str(run_file), "--smoke", *ONE_THREAD, "--dry-run"]
    command += ["--set", f"cache.path={json.dumps(str(cache))}", "--set", 'run.stages=["train", "evaluate"]']
    assert main(command) == 0
    # The prompts in that cache have the split that their plugin gave them. The same ones in a file have another.
    for change in ("data.held_out=0.5", "run.seed=7", 'data.sources=[{path="rows.jsonl"}]'):
        assert main([*command, "--set", change]) == 2
        assert "The cache was made with another split" in capsys.readouterr().err
        elsewhere = ["--set", f"evaluate.tasks={json.dumps([str(rows)])}"]
        assert main([*command, "--set", change, *elsewhere]) == 0


def test_a_cache_knows_what_the_target_computed_in(run_file: Path) -> None:
    plugins = load_plugins()
    digests = set()
    for dtype in ("float32", "bfloat16"):
        overrides = (f'target.dtype="{dtype}"', 'run.stages=["cache", "train"]')
        run = Run(file=load_run_file(run_file, overrides=overrides, plugins=plugins), path=run_file, plugins=plugins)
        assert run.cache.header().computed_in == dtype
        digests.add(json.dumps(run.cache.header().as_json()))
    assert len(digests) == 2


def test_a_cache_that_does_not_say_its_split_is_no_proof(finished: Path, run_file: Path, tmp_path: Path) -> None:
    manifest = json.loads((_folder(finished) / "cache" / "manifest.json").read_text())
    del manifest["header"]["split"], manifest["digest"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    plugins = load_plugins()
    overrides = (f"cache.path={json.dumps(str(tmp_path / 'cache'))}",)
    run = Run(file=load_run_file(run_file, overrides=overrides, plugins=plugins), path=run_file, plugins=plugins)
    with pytest.raises(CacheError, match="made with another split") as problem:
        run.cache.require_same_split()
    assert "does not record" in str(problem.value.found)


@pytest.mark.slow
def test_a_damaged_record_can_be_discarded(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_folder(finished_copy) / "evaluate" / "stage.json").write_text("")
    assert main(["run", str(finished_copy), "--smoke"]) == 2
    assert "--force evaluate" in capsys.readouterr().err
    again = ["--force", "evaluate", "--set", "evaluate.temperature=[0.0]"]
    assert main(["run", str(finished_copy), "--smoke", *again, *ONE_THREAD]) == 0


def test_a_plan_that_another_process_overtook_is_not_done(finished_copy: Path) -> None:
    plugins = load_plugins()
    file = made_small(load_run_file(finished_copy, plugins=plugins))
    run = Run(file=file, path=finished_copy, plugins=plugins)
    record = _folder(finished_copy) / "evaluate" / "stage.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "complete": False}))
    steps = plan(run)
    trained = _folder(finished_copy) / "train" / "stage.json"
    other = json.loads(trained.read_text())
    trained.write_text(json.dumps({**other, "seconds": other["seconds"] + 1}))
    with pytest.raises(StageError, match="changed the stage `train` at the same time"):
        do(run, steps, say=lambda _: None)


def test_a_target_that_changes_while_it_is_read_is_refused(
    run_file: Path, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed carries the digest of the weights that computed it."""
    folder = run_file.parent / "target"
    shutil.copytree(resolve_model("builtin:tiny-qwen3", base=run_file.parent, registry=target.plugins.registry), folder)
    plugins = load_plugins()
    file = load_run_file(run_file, overrides=('target.model="target"',), plugins=plugins)
    run = Run(file=file, path=run_file, plugins=plugins)
    before = run.target.content_digest()
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.123}))
    assert run.target.content_digest() == before
    with pytest.raises(StageError, match="changed while the run was reading it"):
        _ = run.target.model
    assert Run(file=file, path=run_file, plugins=plugins).target.content_digest() != before


def test_an_evaluation_does_not_go_on_at_another_speed(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(finished_copy) / "evaluate"
    record = folder / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    assert main(["run", str(finished_copy), "--smoke", "--set", "run.threads=2"]) == 2
    assert "its timings would be mixed" in capsys.readouterr().err
    assert main(["run", str(finished_copy), "--smoke", *ONE_THREAD]) == 0


def test_a_damaged_draft_of_a_checkpoint_is_not_published(
    finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _folder(finished_copy) / "train"
    record = folder / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False, "made": {}}))
    shutil.rmtree(_folder(finished_copy) / "draft")
    (weights,) = max((folder / "checkpoints").iterdir()).glob("draft/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-20] ^= 1
    weights.write_bytes(content)
    assert main(["run", str(finished_copy), "--smoke", "--stages", "train"]) == 2
    assert "damaged training state" in capsys.readouterr().err
    assert not (_folder(finished_copy) / "draft").exists()
