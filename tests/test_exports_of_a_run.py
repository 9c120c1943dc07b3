"""The installed formats on a real run: as a stage, from its folder, with a card that has the run's own figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main

FORMATS = ("vllm", "sglang", "speculators", "deepspec")


def _run(run_file: Path, *more: str, to: tuple[str, ...] = FORMATS) -> list[str]:
    stages = '["regenerate", "cache", "train", "evaluate", "export"]'
    listed = "[" + ", ".join(f'"{name}"' for name in to) + "]"
    return ["run", str(run_file), "--smoke", "--set", f"run.stages={stages}", "--set", f"export.to={listed}", *more]


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def test_a_run_exports_what_it_trained(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_run(finished_copy)) == 0
    metrics = json.loads((_folder(finished_copy) / "metrics.json").read_text())
    for name in FORMATS:
        out = _folder(finished_copy) / "export" / name
        texts = {path.name: path.read_text() for path in out.iterdir() if path.suffix != ".safetensors"}
        assert not any(str(finished_copy.parent) in text for text in texts.values())
        card, record = texts["README.md"], json.loads(texts["export.json"])
        assert record["target"] == {"name": "builtin:tiny-qwen3", "local": False}
        assert "builtin:tiny-dialogues" in card
        assert "`0.004`" in card, "the learning rate"
        for result in metrics["results"]:
            low, high = result["acceptance_length_interval"]
            row = f"| {result['task']} | {result['temperature']:g} | {result['samples']} | "
            assert f"{row}{result['acceptance_length']:.2f} ({low:.2f}-{high:.2f}) |" in card
    capsys.readouterr()
    assert main(_run(finished_copy)) == 0
    assert "export: already complete" in capsys.readouterr().out
    # What changes no result changes no export.
    assert main(_run(finished_copy, "--set", "train.log_every=3")) == 0
    assert "export: already complete" in capsys.readouterr().out
    # Another evaluation is another card.
    path = _folder(finished_copy) / "metrics.json"
    path.write_text(path.read_text().replace('"run": "quickstart-dflash"', '"run": "another"'))
    assert main([*_run(finished_copy), "--stages", "export"]) == 2
    assert "The run's metrics.json changed" in capsys.readouterr().err
    assert main([*_run(finished_copy), "--force", "export"]) == 0


def test_exports_that_are_gone_are_written_again_and_changed_ones_are_told(
    finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = _folder(finished_copy) / "export"
    assert main(_run(finished_copy, to=("vllm", "deepspec"))) == 0
    shutil.rmtree(exports / "vllm")
    capsys.readouterr()
    assert main(_run(finished_copy, to=("vllm", "deepspec"))) == 0
    assert "export: already complete" not in capsys.readouterr().out
    weights = exports / "vllm" / "model.safetensors"
    whole = weights.read_bytes()
    for change in (lambda: weights.write_bytes(whole[:-100]), weights.unlink):
        change()
        assert main(_run(finished_copy, to=("vllm", "deepspec"))) == 2
        seen = capsys.readouterr().err
        assert "The content of the run's exports changed after the stage `export` had results" in seen
        assert "--force export" in seen
    assert main([*_run(finished_copy, to=("vllm", "deepspec")), "--force", "export"]) == 0
    assert weights.read_bytes() == whole


def test_what_a_user_keeps_in_the_place_of_exports_stays(
    finished_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = _folder(finished_copy) / "export"
    notes = exports / "vllm" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert main(_run(finished_copy, to=("vllm",))) == 2
    assert "the export's folder exists already" in capsys.readouterr().err
    assert notes.read_text() == "mine"
    (tmp_path / "mine").mkdir()
    exports.rename(tmp_path / "mine" / "export")
    exports.symlink_to(tmp_path / "mine" / "export")
    assert main(_run(finished_copy, to=("vllm",))) == 2
    assert "Exports cannot be written to this place" in capsys.readouterr().err
    assert (tmp_path / "mine" / "export" / "vllm" / "notes.txt").read_text() == "mine"


def test_a_run_that_evaluates_nothing_has_no_figures_in_its_card(finished_copy: Path) -> None:
    stages = 'run.stages=["regenerate", "cache", "train", "export"]'
    (_folder(finished_copy) / "metrics.json").unlink()
    shutil.rmtree(_folder(finished_copy) / "evaluate")
    assert main(["run", str(finished_copy), "--smoke", "--set", stages, "--set", 'export.to=["vllm"]']) == 0
    assert "Not measured" in (_folder(finished_copy) / "export" / "vllm" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "to", "says"),
    [
        (("--set", 'draft.type="eagle3"', "--set", "draft.block_size=5"), "sglang", ("block_size",)),
        (("--set", "target.layers=[-1, 4]"), "vllm", ("export.to", "layer -1", "target.layers from 0")),
    ],
)
def test_what_no_engine_serves_is_refused_before_the_first_stage(
    run_file: Path, changes: tuple[str, ...], to: str, says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_run(run_file, *changes, to=(to,))) == 2
    seen = capsys.readouterr()
    assert [part for part in says if part not in seen.err] == []
    assert not (_folder(run_file) / "regenerate").exists()


def test_an_eagle3_run_for_sglang_is_refused_before_the_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "eagle3.toml"
    quickstart = Path(__file__).parents[1] / "examples" / "quickstart" / "eagle3.toml"
    path.write_text(quickstart.read_text().replace("../../runs/", "runs/"))
    assert main(_run(path, to=("vllm", "sglang"))) == 2
    seen = capsys.readouterr().err
    assert "cannot be exported to sglang" in seen
    assert "qk_norm = false" in seen
    assert not (tmp_path / "runs" / "quickstart-eagle3-smoke" / "regenerate").exists()


def test_a_folder_of_a_run_is_exported(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_copy.parent)
    assert main(["export", "runs/quickstart-dflash-smoke", "--to", "speculators"]) == 0
    out = Path("quickstart-dflash-smoke-speculators")
    assert "wrote quickstart-dflash-smoke-speculators: " in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "builtin:tiny-qwen3"
    assert "| held-out | 0 |" in (out / "README.md").read_text()
    assert main(["export", "runs/quickstart-dflash-smoke", "--to", "speculators"]) == 2


def test_a_bare_checkpoint_is_told_its_targets_name(
    drafts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command: list[Any] = ["export", str(drafts["dspark"]), "--to", "speculators", "--out", "mine"]
    assert main(command) == 2
    assert "--target" in capsys.readouterr().err
    assert main([*command, "--target", "org/qwen"]) == 0
    config = json.loads(Path("mine/config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/qwen"
    card = Path("mine/README.md").read_text()
    assert "not known: no run file" in card
    # An Eagle3 checkpoint names its target itself, where it was trained by its path.
    assert main(["export", str(drafts["eagle3"]), "--to", "vllm", "--out", "eagle"]) == 0
    assert json.loads(Path("eagle/export.json").read_text())["target"]["name"] == "tiny-qwen3"


def test_figures_of_another_draft_are_left_out(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_copy.parent)
    path = _folder(finished_copy) / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["draft"]["revision"] = "0" * 64
    path.write_text(json.dumps(metrics))
    assert main(["export", "runs/quickstart-dflash-smoke", "--to", "vllm"]) == 0
    assert "metrics.json beside it is of another draft" in capsys.readouterr().err
    assert "Not measured" in Path("quickstart-dflash-smoke-vllm/README.md").read_text()
