"""The target that an export names is compared with the draft where its config.json lies on this machine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from deepspec_core.checkpoints.published import save_draft
from deepspec_core.cli.main import main
from deepspec_core.interface.models import Target


@pytest.fixture
def folder(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the built-in target, which the drafts are of; one stands beside it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(target.plugins.registry.load("builtin", "tiny-qwen3")(), tmp_path / "other"))


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHANGES = {"hidden_size": 896, "vocab_size": 151936, "num_hidden_layers": 24, "model_type": "qwen2"}


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.parametrize("form", ["gguf", "speculators"])
def test_another_target_is_refused(
    drafts: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str], form: str, key: str
) -> None:
    _edit(folder, **{key: CHANGES[key]})
    assert main(["export", str(drafts["dspark"]), "--to", form, "--target", str(folder), "--out", "mine"]) == 2
    said = capsys.readouterr().err
    assert f"made for another target: `{key}` differs" in said
    assert f"{key} = {CHANGES[key]}" in said
    assert "--target" in said
    assert not Path("mine").exists()


def test_another_target_in_the_hubs_local_files_is_refused(
    drafts: dict[str, Path],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _edit(folder, hidden_size=896)
    stored = tmp_path / "hub" / "models--org--other"
    commit = "0" * 40
    (stored / "snapshots" / commit).mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    shutil.copy(folder / "config.json", stored / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    command = ["export", str(drafts["dspark"]), "--to", "vllm", "--out", "mine", "--target"]
    assert main([*command, "org/other"]) == 2
    assert "`hidden_size` differs" in capsys.readouterr().err
    assert main([*command, "org/unknown"]) == 0


def test_the_draft_of_a_target_of_experts_is_exported(
    tiny_target: Any, tiny_draft: Callable[..., Any], tmp_path: Path
) -> None:
    """Its layers are those of a dense family."""
    made = tiny_target("qwen3_moe")
    save_draft(tiny_draft("dspark", made), made.adapter, tmp_path / "draft")
    command = ["export", str(tmp_path / "draft"), "--to", "deepspec", "--target", str(made.where)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0


def test_a_targets_config_that_cannot_be_read_says_nothing(drafts: dict[str, Path], folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert main(["export", str(drafts["dspark"]), "--to", "vllm", "--target", str(folder), "--out", "mine"]) == 0
