"""From a name in a run file to an adapter and a loaded target, and what is said when that fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deepspec_core.errors import DeepSpecError, TargetError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import fingerprint, load_target, open_adapter, resolve_model, tokenizer_for

PARITY = Path(__file__).parents[2] / "tests" / "parity"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PARITY / "qwen3-target", tmp_path / "target"))


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def load(folder: Path, registry: Registry) -> Any:
    return load_target(open_adapter(folder, registry=registry), folder, dtype=torch.float32, device="cpu")


def test_names_resolve_to_builtins_directories_and_hub_ids(registry: Registry, tmp_path: Path) -> None:
    builtin = resolve_model("builtin:tiny-qwen3", base=tmp_path, registry=registry)
    assert isinstance(builtin, Path)
    assert builtin.name == "tiny-qwen3"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert resolve_model("models/mine", base=tmp_path, registry=registry) == tmp_path / "models" / "mine"
    assert resolve_model("Org/Model-4B", base=tmp_path, registry=registry) == "Org/Model-4B"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such target directory"),
        ("a/b/c", "no such target directory"),
        ("builtin:tiny-dialogues", "not a model"),
        ("builtin:tiny-qwen", "tiny-qwen3"),
    ],
)
def test_names_that_are_nothing_are_refused(name: str, message: str, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(DeepSpecError, match=message):
        resolve_model(name, base=tmp_path, registry=registry)


def test_a_directory_has_no_revision(registry: Registry, folder: Path) -> None:
    with pytest.raises(TargetError, match="revision"):
        resolve_model("target", base=folder.parent, registry=registry, revision="main")


def test_a_directory_opens_with_the_drafts_shape_and_loads(registry: Registry, folder: Path) -> None:
    adapter = open_adapter(folder, registry=registry, draft_layer=LayerOptions(intermediate_size=16))
    assert adapter.draft_config(1, {}).intermediate_size == 16
    target = load_target(adapter, folder, dtype=torch.float32, device="cpu")
    assert target.architecture == adapter.architecture
    assert (target.device, target.dtype) == (torch.device("cpu"), torch.float32)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(target.embedding_weight(), weights["model.embed_tokens.weight"])
    assert torch.equal(target.head_weight(), weights["lm_head.weight"])
    assert not target.head_weight().requires_grad


def with_tokenizer(folder: Path, **special: str) -> None:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", "<mask>", "a"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def test_stop_tokens_come_from_the_generation_config_first(registry: Registry, folder: Path) -> None:
    with_tokenizer(folder, eos_token="<end>")
    edit(folder / "generation_config.json", eos_token_id=[9, 4], pad_token_id=7)
    architecture = open_adapter(folder, registry=registry).architecture
    assert (architecture.stop_token_ids, architecture.pad_token_id) == ((9, 4), 7)


def test_then_from_the_tokenizer_which_also_knows_the_mask(registry: Registry, folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=33)
    with_tokenizer(folder, eos_token="<end>", mask_token="<mask>")
    architecture = open_adapter(folder, registry=registry).architecture
    assert (architecture.stop_token_ids, architecture.mask_token_id) == ((1,), 2)


def test_then_from_the_config(registry: Registry, folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=33)
    assert open_adapter(folder, registry=registry).architecture.stop_token_ids == (33,)
    edit(folder / "config.json", eos_token_id=None)
    with pytest.raises(TargetError, match="has no stop token"):
        open_adapter(folder, registry=registry)


def test_a_tokenizer_loads_or_its_absence_is_told(folder: Path) -> None:
    with pytest.raises(TargetError, match="tokenizer"):
        tokenizer_for(folder)
    with_tokenizer(folder, eos_token="<end>")
    assert tokenizer_for(folder).eos_token_id == 1


def test_bad_configs_are_told_apart(registry: Registry, folder: Path) -> None:
    config = folder / "config.json"
    edit(config, model_type="unheard-of")
    with pytest.raises(TargetError, match="unheard-of"):
        open_adapter(folder, registry=registry)
    edit(config, model_type=...)
    with pytest.raises(TargetError, match="names no model_type"):
        open_adapter(folder, registry=registry)
    edit(config, model_type="qwen3", hidden_size="wide")
    with pytest.raises(TargetError, match="not a valid configuration"):
        open_adapter(folder, registry=registry)
    config.write_text('{"model_type": "qwen3",')
    with pytest.raises(TargetError, match="cannot be read"):
        open_adapter(folder, registry=registry)
    config.write_text("[]")
    with pytest.raises(TargetError, match="cannot be read"):
        open_adapter(folder, registry=registry)
    config.unlink()
    with pytest.raises(TargetError, match=r"no config\.json"):
        open_adapter(folder, registry=registry)


def test_unsupported_shapes_are_refused_with_the_reason(registry: Registry, folder: Path) -> None:
    with pytest.raises(TargetError, match="3 attention heads"):
        open_adapter(folder, registry=registry, draft_layer=LayerOptions(num_heads=3))


def test_a_hub_id_that_cannot_be_had_is_told(registry: Registry) -> None:
    with pytest.raises(TargetError, match="no such local directory, and the Hub"):
        open_adapter("deepspec-tests/does-not-exist", registry=registry)


def test_weights_that_do_not_fit_are_listed(registry: Registry, folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    broken = dict(weights)
    broken.pop("model.layers.3.mlp.up_proj.weight")
    broken["model.layers.2.self_attn.q_norm.weight"] = torch.ones(9)
    broken["model.layers.8.extra.weight"] = torch.ones(1)
    save_file(broken, path, metadata={"format": "pt"})
    with pytest.raises(TargetError) as caught:
        load(folder, registry)
    message = str(caught.value)
    assert "missing: model.layers.3.mlp.up_proj.weight" in message
    assert "not in the model: model.layers.8.extra.weight" in message
    assert "of another shape: model.layers.2.self_attn.q_norm.weight (9,), not (8,)" in message
    assert str(folder) in message


def test_damaged_and_absent_weight_files_are_told(registry: Registry, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TargetError, match="cannot be loaded"):
        load(folder, registry)
    path.unlink()
    with pytest.raises(TargetError, match="cannot be loaded"):
        load(folder, registry)


def test_pickled_weights_are_not_read(registry: Registry, folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(TargetError, match="cannot be loaded"):
        load(folder, registry)


def test_the_fingerprint_follows_config_and_weights(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(folder)
    assert fingerprint(Path(shutil.copytree(folder, tmp_path / "copy"))) == first
    edit(folder / "config.json", rope_theta=1.0)
    assert fingerprint(folder) != first
    second = fingerprint(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != second


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_the_fingerprint_follows_a_weight_in_the_middle(folder: Path) -> None:
    first, before = fingerprint(folder), sizes(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.5.mlp.down_proj.weight"][3] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert sizes(folder) == before
    assert fingerprint(folder) != first


def test_the_fingerprint_follows_what_says_how_weights_are_read(folder: Path) -> None:
    found = [fingerprint(folder)]
    for name in ("model.safetensors.index.json", "adapter_config.json"):
        (folder / name).write_text('{"lora_alpha": 8}')
        found.append(fingerprint(folder))
        (folder / name).write_text('{"lora_alpha": 9}')
        found.append(fingerprint(folder))
    assert len(set(found)) == len(found)


def test_a_target_without_its_files_has_no_fingerprint(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(TargetError, match="cannot be read"):
        fingerprint(folder)
