"""Drafts as other projects write them: old spellings and other names are read; what no draft type can be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_targets import SIZES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft
from deepspec_core.cli.main import main
from deepspec_core.errors import CheckpointError
from deepspec_core.plugins.registry import Registry
from deepspec_export.importing import import_draft


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target of the family qwen3."""
    folder = tmp_path_factory.mktemp("targets") / "target"
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def foreign(drafted: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """foreign(format, algorithm, family, **options): an export without what our exporter writes beside it."""

    def make(form: str, algorithm: str, family: str = "qwen3", **options: Any) -> Path:
        made = drafted(algorithm, family, **options)
        if made.draft.vocabulary is not None:
            made.draft.vocabulary.choose(torch.arange(20) * 2 + 1)
        folder: Path = made.export(form, tmp_path)
        (folder / "export.json").unlink()
        return folder

    return make


def edit(folder: Path, **changes: Any) -> dict[str, Any]:
    """Set keys of config.json; those whose value is None are removed."""
    keys = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in keys.items() if name not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return kept


def edit_layers(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The table of layers of the speculators format, with these keys set and those whose value is None removed."""
    layers = json.loads((folder / "config.json").read_text())["transformer_layer_config"] | changes
    return {name: value for name, value in layers.items() if name not in changes or value is not None}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Other weights in the place of these."""
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(weights), folder / "model.safetensors")


def test_an_eagle3_with_a_midlayer_is_ours(
    foreign: Callable[..., Path], target: Path, registry: Registry, tmp_path: Path
) -> None:
    """As SpecForge writes it: another name of the layer, old spellings, a vocabulary in any order."""
    folder = foreign("sglang", "eagle3", "llama", num_layers=1, vocab_size=20)
    before = load_file(folder / "model.safetensors")
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    ids_D = (torch.arange(20) * 2 + 1)[order]

    def as_others(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["lm_head.weight"] = weights["lm_head.weight"][order].contiguous()
        weights["d2t"] = ids_D - torch.arange(20)
        weights["midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        return {name.replace("layers.0.", "midlayer."): tensor for name, tensor in weights.items()}

    rewrite(folder, as_others)
    edit(folder, rope_parameters=None, rope_theta=50000.0, rope_scaling=None, head_dim=None, layer_types=None)
    imported = import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    assert (imported.format, imported.algorithm) == ("sglang", "eagle3")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert weights["draft_ids"].tolist() == [*range(1, 40, 2)]
    assert torch.equal(weights["lm_head.weight"], before["lm_head.weight"])
    layer = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights[layer], before[layer])
    draft = load_draft(
        tmp_path / "ours", registry=registry, adapter=draft_adapter(tmp_path / "ours", registry=registry)
    )
    assert draft.describe().taps == (1, 4, 6)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 50000.0}
    assert (config["qk_norm"], config["draft_vocab_size"]) == (False, 20)


def test_layers_that_are_not_named_are_those_that_engines_read(
    foreign: Callable[..., Path], target: Path, registry: Registry, tmp_path: Path
) -> None:
    folder = foreign("sglang", "eagle3", "llama", num_layers=1)
    edit(folder, eagle_config=None)
    imported = import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["target_layer_ids"] == [1, 3, 4]
    assert any("[1, 3, 4] are what engines then read" in note for note in imported.notes)


def test_an_anchor_that_predicts_nothing_needs_the_engines_name(
    foreign: Callable[..., Path], target: Path, registry: Registry, tmp_path: Path
) -> None:
    """vLLM's block has four slots where SGLang's proposes three tokens."""
    folder = foreign("sglang", "dspark", markov={"rank": 6}, anchor_predicts=False)
    with pytest.raises(CheckpointError, match="--format vllm or --format sglang"):
        import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    import_draft(folder, str(target), tmp_path / "ours", registry=registry, format_name="sglang")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["block_size"] == 4


REFUSED: list[tuple[str, str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ("vllm", "eagle3", {"num_layers": 1}, {"norm_before_residual": True}, ("norm_before_residual = true", "normed")),
    ("vllm", "eagle3", {"num_layers": 1}, {"norm_before_fc": True}, ("norm_before_fc",)),
    ("vllm", "eagle3", {"num_layers": 1}, {"norm_output": True}, ("norm_output",)),
    ("vllm", "eagle3", {"num_layers": 1}, {"fc_norm": True}, ("num_aux_hidden_states",)),
    ("vllm", "eagle3", {"num_layers": 1}, {"architectures": ["MedusaModel"]}, ("MedusaModel", "DFlashDraftModel")),
    ("vllm", "eagle3", {"num_layers": 1}, {"hidden_size": 16}, ("hidden_size", "expected: 32")),
    ("vllm", "eagle3", {"num_layers": 1}, {"vocab_size": 50}, ("another target", "48")),
    ("vllm", "eagle3", {"num_layers": 1}, {"quantization_config": {"bits": 4}}, ("quantised",)),
    ("vllm", "eagle3", {"num_layers": 1}, {"eagle_aux_hidden_state_layer_ids": [2, 5, 8]}, ("from 0 to 6",)),
    ("vllm", "eagle3", {"num_layers": 1}, {"rope_parameters": None, "rope_theta": None}, ("rotary base",)),
    ("vllm", "eagle3", {"num_layers": 1}, {"num_hidden_layers": 2}, ("layers.1.", "is missing")),
    (
        "vllm",
        "eagle3",
        {"num_layers": 1},
        {"eagle_aux_hidden_state_layer_ids": [7, 5, 2]},
        ("[7, 5, 2]", "rising order"),
    ),
    ("vllm", "dspark", {"markov": {"rank": 6}}, {"target_layer_ids": [6, 4, 1]}, ("target_layer_ids", "rising order")),
    ("vllm", "dspark", {"markov": {"rank": 6}}, {"target_layer_ids": [1, 1, 4]}, ("target_layer_ids", "rising order")),
    ("z-lab", "dflash", {"anchor_predicts": False}, {"is_causal": True}, ("blocks are causal",)),
    ("z-lab", "dflash", {"anchor_predicts": False}, {"final_logit_softcapping": 30.0}, ("final_logit_softcapping",)),
    ("z-lab", "dflash", {"anchor_predicts": False}, {"output_multiplier": 0.5}, ("output_multiplier",)),
    ("z-lab", "dflash", {"anchor_predicts": False}, {"architectures": ["DFlash2DraftModel"]}, ("convolutions",)),
    ("z-lab", "dflash", {"anchor_predicts": False}, {"hidden_act": "gelu"}, ("activation", "silu")),
    ("z-lab", "dflash", {"anchor_predicts": False}, {"attention_bias": True}, ("biases",)),
]


@pytest.mark.parametrize("form", ["z-lab", "vllm", "sglang", "speculators"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, ("layer_types", "one window")),
        ({"layer_types": ["chunked_attention"] * 2}, ("layer_types", "one window")),
        ({"layer_types": []}, ("layer_types", "one window")),
        ({"layer_types": None, "sliding_window": 8, "use_sliding_window": True}, ("layer_types", "sliding_window = 8")),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8, "use_sliding_window": False},
            ("use_sliding_window",),
        ),
    ],
)
def test_layers_of_different_kinds_are_refused(
    foreign: Callable[..., Path], target: Path, registry: Registry, tmp_path: Path, form: str, changes: dict[str, Any],
    says: tuple[str, ...],
) -> None:  # fmt: skip
    folder = foreign(form, "dflash", anchor_predicts=False, num_layers=2)
    tables = {"transformer_layer_config": edit_layers(folder, changes)} if form == "speculators" else changes
    edit(folder, **tables)
    with pytest.raises(CheckpointError) as refused:
        import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    assert [part for part in says if part not in str(refused.value)] == []


def test_a_window_of_all_layers_is_taken_over(
    foreign: Callable[..., Path], target: Path, registry: Registry, tmp_path: Path
) -> None:
    folder = foreign("z-lab", "dflash", anchor_predicts=False, num_layers=2)
    edit(folder, layer_types=["sliding_attention"] * 2, sliding_window=8, use_sliding_window=True, is_causal=False)
    import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["layer_types"], config["sliding_window"]) == (["sliding_attention"] * 2, 8)


@pytest.mark.parametrize(("form", "algorithm", "options", "changes", "says"), REFUSED)
def test_what_cannot_be_ours_is_refused_with_the_reason(
    foreign: Callable[..., Path], target: Path, registry: Registry, tmp_path: Path, form: str, algorithm: str,
    options: dict[str, Any], changes: dict[str, Any], says: tuple[str, ...],
) -> None:  # fmt: skip
    folder = foreign(form, algorithm, **options)
    edit(folder, **changes)
    with pytest.raises(CheckpointError) as refused:
        import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    assert [part for part in says if part not in str(refused.value)] == []
    assert {path.name for path in tmp_path.iterdir()} == {form}


def test_weights_that_are_unknown_unsafe_or_none_are_refused(
    foreign: Callable[..., Path], target: Path, registry: Registry, tmp_path: Path
) -> None:
    folder = foreign("z-lab", "dflash", anchor_predicts=False)
    rewrite(folder, lambda weights: weights | {"mask_embedding": torch.ones(32)})
    with pytest.raises(CheckpointError, match="mask_embedding is not known"):
        import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    rewrite(folder, lambda weights: {n: t for n, t in weights.items() if n != "mask_embedding"} | {
        "norm.weight": torch.full((32,), torch.nan)})  # fmt: skip
    with pytest.raises(CheckpointError, match="not finite"):
        import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    rewrite(folder, lambda weights: weights | {"norm.weight": torch.full((32,), 3e38)})
    with pytest.raises(CheckpointError, match="logits are not finite numbers"):
        import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    assert {path.name for path in tmp_path.iterdir()} == {"z-lab"}


def test_the_command_imports_and_names_what_it_took(
    foreign: Callable[..., Path], target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign("z-lab", "dflash", anchor_predicts=False)
    command = ["import", str(folder), "--target", str(target), "-o", str(tmp_path / "ours")]
    assert main(command) == 0
    seen = capsys.readouterr()
    assert "a draft of type dflash, read as z-lab" in seen.out
    assert "num_anchors = 512" in seen.err
    assert main(command) == 2
    assert "folder exists already" in capsys.readouterr().err
    assert main(["checkpoint", "show", str(tmp_path / "ours")]) == 0
    assert main([*command[:-1], str(tmp_path / ("a" * 252))]) == 2
    assert "no file or folder can have this path" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "other"), "--format", "onnx"]) == 2
    assert "no such format" in capsys.readouterr().err
