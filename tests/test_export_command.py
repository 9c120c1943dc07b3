"""`deepspec export`: a draft without a run file, in a place of its own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepspec_core.cli.main import main
from deepspec_core.interface.models import Target

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "dflash.toml"


@pytest.fixture
def draft(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The draft of a finished run, whose folder is where one stands."""
    monkeypatch.chdir(finished_copy.parent)
    return Path("runs/quickstart-dflash-smoke/draft")


def test_a_draft_is_written_beside(draft: Path, offer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    offer()
    assert main(["export", str(draft), "--to", "plain"]) == 0
    assert "wrote quickstart-dflash-smoke-plain: " in capsys.readouterr().out
    out = Path("quickstart-dflash-smoke-plain")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "w.safetensors"]
    weights, own = load_file(out / "w.safetensors"), load_file(draft / "model.safetensors")
    [norm] = [name for name in weights if name.endswith("hidden_norm.weight")]
    assert torch.equal(weights[norm], own["hidden_norm.weight"].to(weights[norm].dtype))
    assert list(Path().glob(".*")) == []


def test_a_place_of_its_own_is_made_and_never_overwritten(
    draft: Path, offer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    offer()
    command = ["export", str(draft), "--to", "plain", "--out", "served/mine"]
    assert main(command) == 0
    before = (Path("served/mine") / "config.json").stat().st_mtime_ns
    assert main(command) == 2
    assert "the export's folder exists already" in capsys.readouterr().err
    assert (Path("served/mine") / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("answers", "arguments", "says"),
    [
        ({"unservable": '"no tree attention"'}, (), ("cannot be exported to plain", "no tree attention", "--to plain")),
        ({"write": "raise KeyError('q_proj')"}, (), ("the export to plain failed", "KeyError")),
        ({"write": "raise OSError('16384 requested and 7880 written')"}, (), ("There is no room to write", "in part")),
        ({"writer": ""}, (), ("cannot be loaded",)),
        ({}, ("--to", "plane"), ("unknown export format 'plane'", "write 'plain'")),
        ({}, ("--out", "/proc/mine"), ("cannot be written there",)),
        ({}, ("--out", "a" * 252), ("the folder's name is too long", "252 bytes")),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(
    draft: Path,
    offer: Any,
    answers: dict[str, str],
    arguments: tuple[str, ...],
    says: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer(**answers)
    before = sorted(Path().iterdir())
    assert main(["export", str(draft), "--to", "plain", *arguments]) == 2
    seen = capsys.readouterr().err
    assert [part for part in says if part not in seen] == []
    assert "Traceback" not in seen
    assert sorted(Path().iterdir()) == before


def test_a_draft_that_is_not_there(offer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offer()
    assert main(["export", str(tmp_path / "none"), "--to", "plain"]) == 2
    assert "no draft checkpoint in this directory" in capsys.readouterr().err


def test_a_format_that_holds_the_targets_tokens(
    drafts: dict[str, Path],
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a checkpoint alone, --target says where they are; of a run, its own target, a path from the run file."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    command = ["export", str(drafts["dspark"]), "--to", "gguf", "--out", "mine"]
    assert main(command) == 2
    assert "in --target" in capsys.readouterr().err
    assert main([*command, "--target", "./nowhere"]) == 2
    assert "no such target directory" in capsys.readouterr().err
    assert not Path("mine").exists()
    assert main([*command, "--target", "builtin:tiny-qwen3"]) == 0
    tokens = gguf.GGUFReader(Path("mine") / "draft.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[3]) == (1024, "<|mask|>")

    shutil.copytree(target.plugins.registry.load("builtin", "tiny-qwen3")(), "models/tiny")
    shutil.copytree(drafts["dspark"], "runs/mine/draft")
    Path("runs/mine/config.toml").write_text('[run]\noutput = "runs/mine"\n[target]\nmodel = "models/tiny"\n')
    monkeypatch.chdir("runs")
    assert main(["export", "mine", "--to", "gguf"]) == 0
    assert Path("mine-gguf/draft.gguf").is_file()


def test_a_run_whose_folder_does_not_say_where_its_run_file_lay(
    drafts: dict[str, Path],
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`run.output` is absolute: a path in it is not taken from where one stands, and the run file tells."""
    pytest.importorskip("gguf")
    files, run = tmp_path / "files", tmp_path / "results" / "mine"
    shutil.copytree(target.plugins.registry.load("builtin", "tiny-qwen3")(), files / "models" / "tiny")
    shutil.copytree(drafts["dspark"], run / "draft")
    text = QUICKSTART.read_text().replace("../../runs/quickstart-dflash", str(run))
    text = text.replace("builtin:tiny-qwen3", "./models/tiny")
    for path in (files / "train.toml", run / "config.toml"):
        path.write_text(text)
    monkeypatch.chdir(files)
    assert main(["export", str(run), "--to", "gguf", "--out", "served"]) == 2
    said = capsys.readouterr().err
    assert "place of the run file is not known" in said
    assert "--target" in said
    assert main(["export", "train.toml", "--to", "gguf", "--out", "served"]) == 0
    assert Path("served/draft.gguf").is_file()
