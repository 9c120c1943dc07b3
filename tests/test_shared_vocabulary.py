"""Training on stored features reads the target's embedding and lm_head alone, and a draft shares them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec_core.checkpoints.published import load_draft, save_draft
from deepspec_core.cli.main import main
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.errors import TargetError
from deepspec_core.families import vocabulary
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets import opening
from deepspec_core.targets.vocabulary import load_vocabulary

ALGORITHMS = ["dflash", "dspark", "eagle3"]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights that were read."""
    names: list[str] = []
    real = vocabulary.read_weights

    def reading(found: Any) -> Any:
        names.extend(found)
        return real(found)

    monkeypatch.setattr(vocabulary, "read_weights", reading)
    return names


@pytest.mark.parametrize("family", load_plugins().registry.names("target"))
def test_every_family_gives_its_vocabulary_alone(tiny_target: Callable[..., Any], read: list[str], family: str) -> None:
    target = tiny_target(family)
    found = load_vocabulary(target.adapter, target.where, dtype=torch.float32, device="cpu")
    assert found is not None
    assert torch.equal(found.embedding, target.model.embedding_weight())
    assert torch.equal(found.head, target.model.head_weight())
    assert len(read) == 2, read


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_tied_head_is_the_embedding(tiny_target: Callable[..., Any], read: list[str], family: str) -> None:
    target = tiny_target(family, tie_word_embeddings=True)
    found = load_vocabulary(target.adapter, target.where, dtype=torch.bfloat16, device="cpu")
    assert found is not None
    assert found.head is found.embedding
    assert found.head.dtype == torch.bfloat16
    assert len(read) == 1


def test_names_of_a_multimodal_file_are_found(tiny_target: Callable[..., Any], tmp_path: Path, read: list[str]) -> None:
    target = tiny_target("gemma4")
    where = tmp_path / "multimodal"
    shutil.copytree(target.where, where)
    weights = load_file(where / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): weight for name, weight in weights.items()}
    save_file(renamed | {"model.vision_tower.w": torch.ones(1)}, where / "model.safetensors", metadata={"format": "pt"})
    found = vocabulary.read_vocabulary(
        where, target.adapter.text, renamed=target.adapter.text_weights, dtype=torch.float32, device="cpu"
    )
    assert found is not None
    assert torch.equal(found.embedding, target.model.embedding_weight())
    assert "model.language_model.embed_tokens.weight" in read


def test_files_that_do_not_fit_are_refused_or_left_to_the_loader(
    tiny_target: Callable[..., Any], tmp_path: Path
) -> None:
    target = tiny_target("qwen3")
    where = tmp_path / "other"
    shutil.copytree(target.where, where)
    weights = load_file(where / "model.safetensors")
    shorter = weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:-1].clone()}
    save_file(shorter, where / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match="do not fit"):
        load_vocabulary(target.adapter, where, dtype=torch.float32, device="cpu")
    named = {f"other.{name}": weight for name, weight in weights.items()}
    save_file(named, where / "model.safetensors", metadata={"format": "pt"})
    assert load_vocabulary(target.adapter, where, dtype=torch.float32, device="cpu") is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_draft_shares_the_targets_memory_and_its_checkpoint_is_whole(
    tiny_target: Callable[..., Any],
    tiny_draft: Callable[..., DraftModel],
    registry: Registry,
    tmp_path: Path,
    algorithm: str,
) -> None:
    target = tiny_target("qwen3", tie_word_embeddings=True)
    draft = tiny_draft(algorithm, target)
    embedding_VH = target.model.embedding_weight()
    assert draft.embed_tokens.weight.data_ptr() == draft.lm_head.weight.data_ptr() == embedding_VH.data_ptr()
    assert not draft.embed_tokens.weight.requires_grad
    draft.adopt(embedding_VH.bfloat16(), embedding_VH.bfloat16())
    save_draft(draft, target.adapter, tmp_path / "draft")
    again = load_draft(tmp_path / "draft", registry=registry, adapter=target.adapter)
    for part in (again.embed_tokens, again.lm_head):
        assert torch.equal(part.weight, embedding_VH.bfloat16().float())
    assert '"dtype": "float32"' in (tmp_path / "draft" / "config.json").read_text()


def test_a_run_on_stored_features_trains_without_the_rest_of_the_target(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole target is loaded")

    monkeypatch.setattr(opening, "load_target", refuse)
    asked = ["--smoke", "--set", "run.threads=1", "--set", 'run.stages=["regenerate","cache","train"]']
    assert main(["run", str(finished_copy), *asked, "--force", "train"]) == 0, capsys.readouterr().err
