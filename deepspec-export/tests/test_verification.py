"""An export that says otherwise than the draft is, or holds other weights, is refused: each convention by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

from deepspec_core.checkpoints.published import published_weights
from deepspec_core.errors import CheckpointError, ExportError
from deepspec_export import sglang, speculators, vllm, z_lab
from deepspec_export.exporter import EngineExporter
from deepspec_export.replay import replay
from deepspec_export.served import draft_as_served
from deepspec_export.verification import made_up_round, refuse_paths, verify

MODULES = {"vllm": vllm, "sglang": sglang, "speculators": speculators, "z-lab": z_lab}
# (format, draft, options, a key of config.json or of a table in it, its wrong value, what the refusal says)
WRONG = [
    ("vllm", "eagle3", {}, "eagle_aux_hidden_state_layer_ids", [1, 4, 6], "feature_layers"),
    ("vllm", "eagle3", {}, "norm_before_residual", True, "norm_before_residual"),
    ("vllm", "eagle3", {}, "architectures", ["LlamaForCausalLMEagle3"], "head_norms"),
    ("vllm", "eagle3", {}, "num_aux_hidden_states", 5, "num_aux_hidden_states"),
    ("vllm", "eagle3", {}, "norm_output", True, "norm_output"),
    ("vllm", "eagle3", {"layer": {"window": 6}}, "layer_types", ["full_attention"], "window"),
    ("vllm", "dflash", {}, "sample_from_anchor", False, "anchor_predicts"),
    ("vllm", "dflash", {"anchor_predicts": False}, "dflash_config.target_layer_ids", [2, 5, 7], "feature_layers"),
    ("vllm", "dflash", {"anchor_predicts": False}, "dflash_config.mask_token_id", 3, "mask_token_id"),
    ("vllm", "dflash", {"anchor_predicts": False}, "is_causal", True, "block_causal"),
    ("vllm", "dflash", {"anchor_predicts": False}, "block_size", 5, "proposes"),
    ("vllm", "dflash", {"layer": {"window": 6}}, "is_causal", None, "block_causal"),
    ("vllm", "dflash", {}, "rope_parameters", {"rope_type": "default", "rope_theta": 1e6}, "rope"),
    ("vllm", "dspark", {}, "rms_norm_eps", 1e-5, "norm_eps"),
    ("vllm", "dspark", {}, "enable_confidence_head", False, "confidence"),
    ("vllm", "dspark", {}, "markov_rank", 5, "markov_rank"),
    ("vllm", "dspark", {}, "target_layer_ids", None, "needs target_layer_ids"),
    ("sglang", "dspark", {}, "block_size", 5, "proposes"),
    ("sglang", "dspark", {}, "markov_head_type", "gated", "markov_head"),
    ("sglang", "dspark", {"anchor_predicts": False}, "sample_from_anchor", None, "anchor_predicts"),
    ("sglang", "eagle3", {"qk_norm": False}, "eagle_config.eagle_aux_hidden_state_layer_ids", [2, 5, 7], "feature_lay"),
    ("sglang", "eagle3", {"qk_norm": False}, "draft_vocab_size", 32, "draft_vocab_size"),
    ("z-lab", "dflash", {"anchor_predicts": False}, "block_size", 5, "proposes"),
    ("z-lab", "dflash", {"anchor_predicts": False}, "dflash_config.target_layer_ids", [2, 5, 7], "feature_layers"),
    ("z-lab", "dflash", {"anchor_predicts": False, "layer": {"window": 6}}, "is_causal", None, "block_causal"),
    ("z-lab", "dflash", {"anchor_predicts": False}, "dflash_config", None, "needs dflash_config"),
    ("speculators", "dspark", {}, "sample_from_anchor", None, "anchor_predicts"),
    ("speculators", "dspark", {}, "aux_hidden_state_layer_ids", [1, 4, 6], "feature_layers"),
    ("speculators", "dflash", {"anchor_predicts": False}, "sample_from_anchor", True, "needs sample_from_anchor"),
    ("speculators", "eagle3", {}, "norm_before_residual", None, "norm_before_residual"),
    ("speculators", "eagle3", {}, "transformer_layer_config.model_type", "llama", "head_norms"),
    ("speculators", "dspark", {}, "transformer_layer_config.head_dim", 4, "head_dim"),
]


def _edit(path: Path, key: str, value: Any) -> None:
    """Set a key, or remove it where the value is None."""
    config = json.loads(path.read_text())
    *tables, last = key.split(".")
    inner = config
    for table in tables:
        inner = inner[table]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(config))


def _verify(made: Any, format_name: str, folder: Path, written: dict[str, torch.Tensor]) -> None:
    verify(
        folder,
        read=MODULES[format_name].read,
        expected=draft_as_served(made.facts),
        written=written,
        draft=made.draft,
    )


@pytest.mark.parametrize(("format_name", "algorithm", "options", "key", "value", "says"), WRONG)
def test_each_convention_is_compared(
    drafted: Callable[..., Any],
    tmp_path: Path,
    format_name: str,
    algorithm: str,
    options: dict[str, Any],
    key: str,
    value: Any,
    says: str,
) -> None:
    markov = {"rank": 6} if algorithm == "dspark" else None
    made = drafted(algorithm, **{"num_layers": 1, "markov": markov} | options)
    folder = made.export(format_name, tmp_path)
    written = load_file(folder / "model.safetensors")
    _verify(made, format_name, folder, written)
    _edit(folder / "config.json", key, value)
    with pytest.raises(ExportError) as refused:
        _verify(made, format_name, folder, written)
    assert says in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop("hidden_norm.weight"), "hidden_norm.weight is missing"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra is not known to the engine"),
        (lambda weights: weights.update({"fc.weight": weights["fc.weight"][:, :32].clone()}), "and the engine takes"),
        (lambda weights: weights["norm.weight"].add_(1e-6), "norm.weight differs from the draft's"),
        (lambda weights: weights.update({"fc.weight": weights["fc.weight"].double()}), "fc.weight differs"),
        (lambda weights: weights.update({"lm_head.weight": torch.zeros(48, 32)}), "lm_head.weight is not the draft's"),
    ],
)
def test_each_weight_is_compared(
    drafted: Callable[..., Any], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], says: str
) -> None:
    made = drafted("dspark", markov={"rank": 6})
    folder = made.export("vllm", tmp_path)
    written = load_file(folder / "model.safetensors")
    changed = {name: tensor.clone() for name, tensor in written.items()}
    change(changed)
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(ExportError, match=says):
        _verify(made, "vllm", folder, written)


# What a wrong convention changes, and a draft in which it shows.
OTHERWISE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("eagle3", {}, {"feature_layers": (4, 1, 6)}),
    ("eagle3", {}, {"norm_before_residual": True}),
    ("eagle3", {"layer": {"window": 6}}, {"window": None}),
    ("eagle3", {}, {"rope": {"rope_type": "default", "rope_theta": 1e6}}),
    ("eagle3", {}, {"head_norms": False}),
    ("dflash", {"anchor_predicts": False}, {"anchor_predicts": True}),
    ("dflash", {}, {"block_causal": True}),
    ("dflash", {"layer": {"window": 6}}, {"window": 7}),
    ("dflash", {}, {"mask_token_id": 3}),
    ("dflash", {}, {"norm_eps": 0.1}),
    ("dspark", {"confidence_head": False}, {"markov_rank": 0}),
    ("dspark", {"markov": {"rank": 6, "head": "gated"}}, {"markov_head": "vanilla"}),
    ("dspark", {"markov": {"rank": 6, "head": "rnn"}}, {"markov_head": "vanilla"}),
]


@pytest.mark.parametrize(("algorithm", "options", "otherwise"), OTHERWISE)
def test_the_replay_sees_a_wrong_convention(
    drafted: Callable[..., Any], algorithm: str, options: dict[str, Any], otherwise: dict[str, Any]
) -> None:
    made = drafted(algorithm, **{"num_layers": 1, "markov": {"rank": 6} if algorithm == "dspark" else None} | options)
    served = draft_as_served(made.facts)
    tensors = published_weights(made.draft)
    if algorithm == "dflash":
        tensors["markov_head.markov_w1.weight"] = torch.zeros(48, 1)
        tensors["markov_head.markov_w2.weight"] = torch.zeros(48, 1)
    embedding, head = tensors["embed_tokens.weight"], tensors["lm_head.weight"]
    with torch.no_grad():
        given, mine, _ = made_up_round(made.draft, 20)
        right = replay(served, tensors, embedding, head, given).log_probabilities_KV
        wrong = replay(evolve(served, **otherwise), tensors, embedding, head, given).log_probabilities_KV
    torch.testing.assert_close(right, mine, rtol=0, atol=1e-4)
    assert (wrong - mine).abs().max() > 0.02, "many times the tolerance"


def test_a_replay_that_differs_is_refused(
    drafted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = drafted("dflash")
    # Neither weights nor config say anything of it.
    for layer in made.draft.backbone.layers:
        monkeypatch.setattr(layer.attention, "scale", 0.1)
    with pytest.raises(ExportError, match="log probabilities differ by"):
        EngineExporter(format=vllm).write(made.draft, made.facts, tmp_path)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("trained on /home/someone/models/qwen", True),
        ("file:///data/x", True),
        ("org/model and https://example.org/a/b, 3/4 of it, and/or ./draft", False),
    ],
)
def test_no_path_of_a_machine_is_let_through(tmp_path: Path, text: str, refused: bool) -> None:
    (tmp_path / "README.md").write_text(text)
    if refused:
        with pytest.raises(ExportError, match="a path of this machine"):
            refuse_paths(tmp_path)
    else:
        refuse_paths(tmp_path)


@pytest.mark.parametrize("algorithm", ["eagle3", "dspark"])
def test_a_draft_that_computes_no_numbers_is_told_as_such(
    drafted: Callable[..., Any], tmp_path: Path, algorithm: str
) -> None:
    made = drafted(algorithm)
    with torch.no_grad():
        published_weights(made.draft)["norm.weight"].fill_(3e38)
    with pytest.raises(CheckpointError, match="logits are not finite numbers"):
        made.export("vllm", tmp_path)
