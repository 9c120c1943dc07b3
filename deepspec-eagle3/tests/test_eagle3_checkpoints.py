"""Published checkpoints: read as they are, written the same, recognised and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepspec_core.blocks.published import load_draft, read_draft_config, save_draft
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.errors import CheckpointError
from deepspec_core.registry import Registry
from deepspec_eagle3.model import Eagle3Model
from deepspec_eagle3.options import Eagle3Options, is_eagle3, options_of

AdapterOf = Callable[[str], TargetAdapter]
PUBLISHED = {
    "target_layer_ids", "num_target_layers", "ttt_length", "step_loss_decay", "draft_num_hidden_layers",
    "target_model_name_or_path",
}  # fmt: skip


def _load(path: Path, registry: Registry, adapter: TargetAdapter) -> Eagle3Model:
    model = load_draft(path, registry=registry, adapter=adapter)
    assert isinstance(model, Eagle3Model)
    return model


def test_a_published_checkpoint_survives_a_round_trip(
    parity: Path, tmp_path: Path, registry: Registry, adapter_of: AdapterOf, family: str
) -> None:
    original, copy = parity / f"{family}-eagle3" / "draft", tmp_path / "copy"
    save_draft(_load(original, registry, adapter_of(family)), adapter_of(family), copy)
    weights, expected = load_file(copy / "model.safetensors"), load_file(original / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    config, recorded = read_draft_config(copy), read_draft_config(original)
    for key in (*PUBLISHED, "architectures", "num_hidden_layers", "layer_types", "tie_word_embeddings", "dtype"):
        assert config[key] == recorded[key], key
    assert "qk_norm" not in config
    assert config["target_model_name_or_path"] == f"tiny-{family}"


@pytest.mark.parametrize(
    "options",
    [
        {"ttt_length": 3, "step_decay": 0.5, "num_layers": 2, "qk_norm": False},
        {"ttt_length": 5, "target_name": "somebody/some-target"},
    ],
)
def test_proposals_survive_a_round_trip(
    make_model: Callable[..., Eagle3Model],
    tmp_path: Path,
    registry: Registry,
    adapter_of: AdapterOf,
    family: str,
    options: dict[str, Any],
) -> None:
    model, adapter = make_model(family=family, taps=(1, 4), **options), adapter_of(family)
    save_draft(model, adapter, tmp_path / "draft")
    config = read_draft_config(tmp_path / "draft")
    assert config.keys() >= PUBLISHED
    loaded = _load(tmp_path / "draft", registry, adapter)
    assert loaded.options == model.options
    assert loaded.describe() == model.describe()
    names = load_file(tmp_path / "draft" / "model.safetensors").keys()
    assert "layers.0.hidden_norm.weight" in names
    assert "hidden_norm.weight" not in names
    assert ("layers.0.self_attn.q_norm.weight" in names) == options.get("qk_norm", True)
    torch.manual_seed(1)
    features, prompt = torch.randn(1, 6, 64), torch.randint(2, 60, (1, 6))
    proposals = []
    for one in (model, loaded):
        proposer = one.proposer()
        proposer.open_slots(1, 16)
        slot = torch.tensor([0])
        proposer.start(slot, prompt, torch.tensor([6]), torch.tensor([7]), features)
        proposals.append(
            proposer.propose(slot, torch.tensor([5]), Sampling(temperature=1.0), torch.full((1, 5), 0.5), ())
        )
    assert torch.equal(proposals[0].tokens, proposals[1].tokens)
    assert torch.equal(proposals[0].probabilities, proposals[1].probabilities)


def test_the_target_is_named(make_model: Callable[..., Eagle3Model], adapter_of: AdapterOf) -> None:
    adapter = adapter_of("qwen3")
    assert adapter.architecture.name.endswith("qwen3-target")
    assert make_model().config()["target_model_name_or_path"] == adapter.architecture.name
    assert make_model(target_name="a/b").config()["target_model_name_or_path"] == "a/b"


def test_a_bfloat16_draft_decodes(parity: Path, registry: Registry, adapter_of: AdapterOf, family: str) -> None:
    path = parity / f"{family}-eagle3" / "draft"
    model = load_draft(path, registry=registry, adapter=adapter_of(family), dtype=torch.bfloat16)
    proposer = model.proposer()
    proposer.open_slots(1, 16)
    slot, four = torch.tensor([0]), torch.tensor([4])
    proposer.start(slot, torch.ones(1, 4, dtype=torch.long), four, four, torch.randn(1, 4, 160))
    proposal = proposer.propose(slot, four, Sampling(temperature=1.0), torch.full((1, 4), 0.5), ())
    assert proposal.probabilities is not None
    assert proposal.probabilities.dtype == torch.float32
    assert proposal.lengths.tolist() == [3]


def test_only_its_own_are_recognised(parity: Path) -> None:
    for family in ("qwen3", "gemma4"):
        config = read_draft_config(parity / f"{family}-eagle3" / "draft")
        assert is_eagle3(config)
        options, taps = options_of(config)
        assert options == Eagle3Options(ttt_length=3, target_name=f"tiny-{family}")
        assert taps == (0, 2, 3, 5, 6)
    assert not is_eagle3(read_draft_config(parity / "qwen3-dflash" / "draft"))
    assert not is_eagle3({"architectures": ["Qwen3DSparkModel"], "ttt_length": 7})
    assert not is_eagle3({"architectures": ["LlamaForCausalLMEagle3"]})
    assert not is_eagle3({})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ttt_length": None}, "expected: 'ttt_length'"),
        ({"step_loss_decay": None}, "expected: 'step_loss_decay'"),
        ({"ttt_length": "seven"}, "does not describe an Eagle3 draft"),
        ({"draft_num_hidden_layers": 0}, "does not describe an Eagle3 draft"),
        ({"step_loss_decay": -1}, "does not describe an Eagle3 draft"),
        ({"target_layer_ids": 3}, "does not describe an Eagle3 draft"),
        ({"target_layer_ids": [1, 2]}, r"of another shape: fc.weight \[32, 160\], expected \[32, 64\]"),
        ({"draft_num_hidden_layers": 2}, "missing: layers.1.input_layernorm.weight"),
        ({"qk_norm": False}, "unexpected: layers.0.self_attn.k_norm.weight"),
    ],
)
def test_damage_is_named(
    parity: Path, tmp_path: Path, registry: Registry, adapter_of: AdapterOf, changes: dict[str, object], expected: str
) -> None:
    path = Path(shutil.copytree(parity / "qwen3-eagle3" / "draft", tmp_path / "draft"))
    config = read_draft_config(path) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(CheckpointError, match=expected) as error:
        load_draft(path, registry=registry, adapter=adapter_of("qwen3"))
    assert str(path) in str(error.value), "says where"
