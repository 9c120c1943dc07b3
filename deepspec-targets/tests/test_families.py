"""Targets of every family: features, decoding and loading are what the model itself computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec_core.errors import TargetError
from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.families.transformers_target import TransformersTarget
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import load_target, open_adapter

VOCAB = 61
TAPS = (-1, 0, 2, 4)
EXACT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def target(family: Any, adapter: FamilyAdapter) -> TransformersTarget:
    return TransformersTarget(family.model(), adapter.architecture)


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def alone(model: Any, ids_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Taps [T, C], last hidden [T, H] and logits [T, V] of one sequence, by the model's own forward."""
    out = model(ids_T[None], output_hidden_states=True)
    taps = torch.cat([out.hidden_states[tap + 1] for tap in TAPS], dim=-1)
    return taps[0], out.hidden_states[-1][0], out.logits[0]


def test_a_tree_with_positions_of_a_chain_is_refused(target: TransformersTarget) -> None:
    target.open_slots(1, 16)
    sees = torch.tensor([[[True, False, False], [True, True, False], [True, False, True]]])
    with pytest.raises(RuntimeError, match="positions go on"):
        target.decode(torch.tensor([0]), tokens(3, seed=1)[None], torch.tensor([[0, 1, 2]]), TAPS, sees=sees)


def loaded(where: Path, registry: Registry, family: Any) -> Any:
    adapter = open_adapter(where, registry=registry, draft_layer=family.layer)
    return load_target(adapter, where, dtype=torch.float32, device="cpu")


def agree(target: Any, model: Any) -> None:
    ids = tokens(9, seed=3)
    hidden, last_hidden, _ = alone(model, ids)
    features = target.features(ids[None], torch.ones(1, 9), None, None, TAPS)
    torch.testing.assert_close(features.hidden[0], hidden, **EXACT)
    torch.testing.assert_close(features.last_hidden[0], last_hidden, **EXACT)


def test_a_saved_target_loads_and_is_checked_strictly(family: Any, registry: Registry, tmp_path: Path) -> None:
    model = family.model()
    model.save_pretrained(tmp_path)
    target = loaded(tmp_path, registry, family)
    assert target.architecture.dense == (family.layer is None)
    agree(target, model)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("layers.3.self_attn.q_proj.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"missing: \S*layers\.3\.self_attn\.q_proj\.weight"):
        loaded(tmp_path, registry, family)


def vision(name: str) -> Any:
    """Small vision parts, whose weights the text part must do without."""
    import transformers

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name == "gemma3":
        return transformers.SiglipVisionConfig(**small, image_size=28, patch_size=14).to_dict()
    if name == "gemma4-unified":
        return {"mm_embed_dim": 16, "output_proj_dims": 16}
    return small | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4-unified"])
def test_of_a_multimodal_model_only_the_text_part_is_loaded(
    name: str, families: Any, registry: Registry, tmp_path: Path
) -> None:
    import transformers

    family = families[name]
    kind = {"gemma3": "Gemma3", "gemma4": "Gemma4", "gemma4-unified": "Gemma4Unified"}[name]
    parts: dict[str, Any] = {"text_config": family.config().to_dict(), "vision_config": vision(name)}
    if name != "gemma3":
        parts["audio_config"] = None
    config = getattr(transformers, f"{kind}Config")(**parts)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().eval()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("vision" in weight for weight in names)
    target = loaded(tmp_path, registry, family)
    assert not [parameter for parameter, _ in target.model.named_parameters() if "vision" in parameter]
    agree(target, model)
    whole = TransformersTarget(model, target.architecture)  # as quantised ones are
    agree(whole, model)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"another_tower.weight": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match=r"not in the model: another_tower\.weight"):
        loaded(tmp_path, registry, family)


def test_both_spellings_of_the_gemma4_config_load(families: Any, registry: Registry, tmp_path: Path) -> None:
    family = families["gemma4"]
    model = family.model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    full = {"head_dim": 16, "num_key_value_heads": 1}
    new = {"per_layer_config": {"2": full, "5": full}}
    old = {"global_head_dim": 16, "num_global_key_value_heads": 1}
    for spelling, other in ((new, old), (old, new)):
        path.write_text(json.dumps({key: value for key, value in written.items() if key not in other} | spelling))
        agree(loaded(tmp_path, registry, family), model)
