"""`deepspec export`: a draft without a run file, in a place of its own."""

import json
import os
import shlex
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


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_every_file_has_the_permissions_that_the_umask_gives(draft: Path, umask: int) -> None:
    """Of the weights too, which safetensors writes for their owner alone: another user serves the draft."""
    before = os.umask(umask)
    try:
        assert main(["export", str(draft), "--to", "vllm", "--out", "served"]) == 0
        assert main(["import", "served", "--target", "builtin:tiny-qwen3", "--out", "imported"]) == 0
    finally:
        os.umask(before)
    for folder in ("served", "imported"):
        modes = {path.name: path.stat().st_mode & 0o777 for path in Path(folder).iterdir()}
        assert "model.safetensors" in modes
        assert set(modes.values()) == {0o666 & ~umask}, modes


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
        ({"unservable": "True"}, (), ("does not say whether it takes the draft", "True from", "deepspec-exports")),
        ({"unservable": "''"}, (), ("does not say whether it takes the draft", "'' from")),
        ({}, ("--out", "/proc/mine"), ("cannot be written there",)),
        ({}, ("--out", "x" * 250), ("can have this path", "250 bytes")),
        ({}, ("--out", "a\0b"), ("can have this path", "null byte")),
        ({}, ("--out", "a/" * 2100), ("can have this path", "bytes long")),
        ({}, ("--out", "~nobody-here/a"), ("cannot be written there", "home directory")),
        ({}, ("--target", " "), ("--target is empty",)),
        ({}, ("--prompts", "3"), ("--draft-vocab", "give both")),
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


@pytest.mark.parametrize("name", ["none", "x" * 300])
def test_a_draft_that_is_not_there(offer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    offer()
    assert main(["export", str(tmp_path / name), "--to", "plain"]) == 2
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


def test_code_of_the_target_is_not_run_because_a_folder_says_so(
    drafts: dict[str, Path],
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The folder may come from somebody else. A run file that is named is the user's own."""
    pytest.importorskip("gguf")
    model, run, ran = tmp_path / "models" / "tiny", tmp_path / "runs" / "mine", tmp_path / "ran"
    shutil.copytree(target.plugins.registry.load("builtin", "tiny-qwen3")(), model)
    settings, sizes = (json.loads((model / f"{name}.json").read_text()) for name in ("tokenizer_config", "config"))
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    unknown = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (model / "config.json").write_text(json.dumps(sizes | unknown))
    # A class of its own: transformers notes on the class that it came from such a file.
    (model / "mine.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Mine(PreTrainedTokenizerFast): pass\n"
    )
    shutil.copytree(drafts["dspark"], run / "draft")
    text = QUICKSTART.read_text().replace("../../runs/quickstart-dflash", "runs/mine")
    text = text.replace('"builtin:tiny-qwen3"', '"./models/tiny"\ntrust_remote_code = true')
    for path in (tmp_path / "train.toml", run / "config.toml"):
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    for given in ("runs/mine", "runs/mine/draft", "runs/mine/config.toml"):
        assert main(["export", given, "--to", "gguf", "--out", "served"]) == 2
        said = capsys.readouterr().err
        assert "cannot be loaded without code from the target's repository" in said
        assert "name the run file in place of the folder" in said
    assert main(["export", "runs/mine", "--to", "deepspec", "--draft-vocab", "9", "--out", "served"]) == 2
    assert "name the run file in place of the folder" in capsys.readouterr().err
    # transformers can do without the code where the family is one that it knows.
    (model / "config.json").write_text(json.dumps(sizes))
    assert main(["export", "runs/mine", "--to", "gguf", "--out", "plain"]) == 0, capsys.readouterr().err
    assert not ran.exists()
    assert main(["export", "train.toml", "--to", "gguf", "--out", "served"]) == 0, capsys.readouterr().err
    assert ran.exists()


def test_the_run_file_that_is_saved_beside_a_draft_names_its_folder(
    draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = draft.parent / "config.toml"
    assert main(["export", str(saved), "--to", "vllm"]) == 0, capsys.readouterr().err
    assert "| held-out | 0 |" in Path("quickstart-dflash-smoke-vllm/README.md").read_text()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ('target = "x"', "config.toml: target"),
        ("run = 3", "config.toml: run"),
        ("draft = [1]", "config.toml: draft"),
        ('[data]\nsources = ["a"]', "config.toml: data.sources"),
        ("[data]\nsources = 3", "config.toml: data.sources"),
        ('[data]\nsources = [{ path = "a", limit = "b" }]', "config.toml: data.sources"),
    ],
)
def test_a_saved_run_file_that_says_nonsense_is_refused_with_its_place(
    draft: Path, capsys: pytest.CaptureFixture[str], table: str, says: str
) -> None:
    (draft.parent / "config.toml").write_text(f"{table}\n")
    assert main(["export", str(draft), "--to", "vllm", "--out", "served"]) == 2
    said = capsys.readouterr().err
    assert "the run file beside the draft cannot be read" in said
    assert says in said
    assert "plugin" not in said
    assert not Path("served").exists()


@pytest.mark.parametrize(("kind", "form"), [("dspark", "vllm"), ("eagle3", "vllm"), ("dspark", "gguf")])
def test_an_export_is_no_checkpoint_and_says_for_which_engine_it_is(
    drafts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    form: str,
) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    once = ["export", str(drafts[kind]), "--to", form, "--target", "builtin:tiny-qwen3", "--out", "once"]
    assert main(once) == 0
    assert main(["export", "once", "--to", "vllm", "--out", "twice"]) == 2
    said = capsys.readouterr().err
    assert f"an export in the format {form}, and no checkpoint" in said
    assert "deepspec import" in said
    assert main(["export", str(drafts[kind]), "--to", "deepspec", "--out", "copy"]) == 0
    assert main(["export", "copy", "--to", "vllm", "--out", "twice"]) == 0, "this format is a checkpoint"


@pytest.mark.parametrize("form", ["vllm", "deepspec"])
def test_a_targets_name_is_quoted_where_a_command_is_shown(drafts: dict[str, Path], tmp_path: Path, form: str) -> None:
    name = "My Model; rm x"
    out = tmp_path / "out"
    assert main(["export", str(drafts["dspark"]), "--to", form, "--target", name, "--out", str(out)]) == 0
    command = (out / "README.md").read_text().split("```sh\n")[1].split("\n```")[0]
    assert name in shlex.split(command)
