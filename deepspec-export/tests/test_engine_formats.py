"""Every draft that an engine can serve, in every format: what its files say, in the words that the engine reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file

FORMATS = ("vllm", "sglang", "speculators")
ROPE = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
QWEN3 = {"layer": {"style": "qwen3"}}
DRAFTS = {
    "dflash": ("dflash", "qwen3", {"anchor_predicts": False}),
    "dflash, anchor predicts": ("dflash", "qwen3", {}),
    "dflash, window": ("dflash", "qwen3", {"anchor_predicts": False, "layer": {"window": 6}}),
    "dflash, yarn": ("dflash", "qwen3", {"anchor_predicts": False, "layer": {"rope": ROPE}}),
    "dflash of experts": ("dflash", "qwen3_moe", {}),
    "dflash of qwen2 in qwen3's style": ("dflash", "qwen2", {**QWEN3, "anchor_predicts": False}),
    "dspark of llama in qwen3's style": ("dspark", "llama", {**QWEN3, "markov": {"rank": 6}}),
    "dspark of gemma4 in qwen3's style": ("dspark", "gemma4", {**QWEN3, "markov": {"rank": 6}}),
    "eagle3 of gemma4 in llama's style": ("eagle3", "gemma4", {"num_layers": 1, "layer": {"style": "llama"}}),
    "dspark": ("dspark", "qwen3", {"markov": {"rank": 6}}),
    "dspark, plain confidence": ("dspark", "qwen3", {"markov": {"rank": 6}, "confidence_with_markov": False}),
    "dspark, no confidence": ("dspark", "qwen3", {"markov": {"rank": 6}, "confidence_head": False}),
    "dspark, no Markov head": ("dspark", "qwen3", {"markov": {"rank": 0}, "confidence_with_markov": False}),
    "dspark, anchor predicts nothing": ("dspark", "qwen3", {"markov": {"rank": 6}, "anchor_predicts": False}),
    "dspark, window": ("dspark", "qwen3", {"markov": {"rank": 6}, "layer": {"window": 6}}),
    "dspark, gated": ("dspark", "qwen3", {"markov": {"rank": 6, "head": "gated"}}),
    "dspark, rnn": ("dspark", "qwen3", {"markov": {"rank": 6, "head": "rnn"}}),
    "eagle3": ("eagle3", "qwen3", {"num_layers": 1}),
    "eagle3, two layers": ("eagle3", "qwen3", {"num_layers": 2}),
    "eagle3, no head norms": ("eagle3", "qwen3", {"num_layers": 1, "qk_norm": False}),
    "eagle3 of llama": ("eagle3", "llama", {"num_layers": 1}),
    "eagle3 of mistral, window": ("eagle3", "mistral", {"num_layers": 1, "layer": {"window": 6}}),
    "eagle3, window": ("eagle3", "qwen3", {"num_layers": 1, "layer": {"window": 6}}),
    "eagle3, reduced vocabulary": ("eagle3", "llama", {"num_layers": 1, "vocab_size": 20}),
}
# What an engine cannot serve: test_refusals.py has the reasons.
REFUSED = {
    "dspark, gated": ("vllm", "speculators"),
    "dspark, rnn": ("vllm", "speculators"),
    "dflash of qwen2 in qwen3's style": ("sglang",),
    "dspark of gemma4 in qwen3's style": ("sglang",),
    "eagle3": ("sglang",),
    "eagle3, two layers": ("sglang",),
    "eagle3 of mistral, window": ("sglang",),
    "eagle3, window": ("sglang",),
}


def _exported(drafted: Callable[..., Any], name: str, format_name: str, out: Path) -> tuple[dict[str, Any], Path]:
    algorithm, family, options = DRAFTS[name]
    folder = drafted(algorithm, family, **options).export(format_name, out)
    return json.loads((folder / "config.json").read_text()), folder


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_what_is_exported_was_read_back_and_replayed(
    drafted: Callable[..., Any], tmp_path: Path, name: str, format_name: str
) -> None:
    algorithm, family, options = DRAFTS[name]
    made = drafted(algorithm, family, **options)
    if format_name in REFUSED.get(name, ()):
        assert made.unservable(format_name) is not None
        return
    folder = made.export(format_name, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "export.json", "README.md"}
    record = json.loads((folder / "export.json").read_text())
    replay = record["verified"]["replay"]
    assert replay["log_probabilities_differ_by"] < 1e-4
    assert ("confidence_differs_by" in replay) == bool(made.facts.config.get("enable_confidence_head"))
    assert replay["proposals"] == made.facts.description.max_tokens == record["served_as"]["num_speculative_tokens"]
    assert record["verified"]["conventions"]["feature_layers"] == [1, 4, 6]
    assert record["verified"]["weights"]["tensors"] == len(load_file(folder / "model.safetensors"))
    assert record["written_for"]
    if made.facts.description.window is not None:
        assert replay["context"] > made.facts.description.window
    text = (folder / "README.md").read_text()
    assert "org/target" in text
    assert '"DIR"' in text or "path DIR" in text


@pytest.mark.parametrize("name", [name for name, (algorithm, *_) in DRAFTS.items() if algorithm == "dflash"])
def test_z_labs_layout_has_every_dflash_draft_whose_anchor_predicts_nothing(
    drafted: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    algorithm, family, options = DRAFTS[name]
    made = drafted(algorithm, family, **options)
    if options.get("anchor_predicts", True):
        assert "anchor_predicts = false" in (made.unservable("z-lab") or "")
        return
    folder = made.export("z-lab", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {"target_layer_ids": [1, 4, 6], "mask_token_id": 47}
    assert (config["block_size"], config["num_target_layers"], config["is_causal"]) == (4, 8, False)
    replay = json.loads((folder / "export.json").read_text())["verified"]["replay"]
    assert replay["log_probabilities_differ_by"] < 1e-4
    text = (folder / "README.md").read_text()
    assert '"method": "dflash"' in text
    assert "--speculative-algorithm DFLASH" in text


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_reduced_vocabulary_is_told_by_offsets(drafted: Callable[..., Any], tmp_path: Path, format_name: str) -> None:
    algorithm, family, options = DRAFTS["eagle3, reduced vocabulary"]
    made = drafted(algorithm, family, **options)
    ids_D = torch.arange(20) * 2 + 1
    made.draft.vocabulary.choose(ids_D)
    folder = made.export(format_name, tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["draft_vocab_size"] == 20
    assert torch.equal(weights["d2t"] + torch.arange(20), ids_D)
    assert weights["d2t"].dtype == torch.int64
    assert weights["t2d"].nonzero()[:, 0].tolist() == ids_D.tolist()
    assert torch.equal(weights["lm_head.weight"], made.draft.lm_head.weight)
    assert "20 of the target's 48 tokens" in (folder / "README.md").read_text()


def test_a_reduced_vocabulary_keeps_its_ids_in_the_published_layout(
    drafted: Callable[..., Any], tmp_path: Path
) -> None:
    """Also where weights are stored in bfloat16, which holds few whole numbers."""
    algorithm, family, options = DRAFTS["eagle3, reduced vocabulary"]
    made = drafted(algorithm, family, **options)
    made = evolve(made, facts=evolve(made.facts, config={**made.facts.config, "dtype": "bfloat16"}))
    weights = load_file(made.export("deepspec", tmp_path) / "model.safetensors")
    assert torch.equal(weights["draft_ids"], torch.arange(20))


def test_layers_are_numbered_as_each_engine_counts(drafted: Callable[..., Any], tmp_path: Path) -> None:
    for name, plain in (("eagle3 of llama", "eagle3"), ("dspark", "dspark"), ("dflash", "dflash")):
        vllm, _ = _exported(drafted, name, "vllm", tmp_path / plain)
        sglang, _ = _exported(drafted, name, "sglang", tmp_path / plain)
        table, _ = _exported(drafted, name, "speculators", tmp_path / plain)
        if plain == "eagle3":
            assert vllm["eagle_aux_hidden_state_layer_ids"] == [2, 5, 7], "vLLM counts the embedding"
            assert vllm["num_aux_hidden_states"] == 3
            assert sglang["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 4, 6]
            assert table["eagle_aux_hidden_state_layer_ids"] == [2, 5, 7]
            assert table["transformer_layer_config"]["num_aux_hidden_states"] == 3
        else:
            inside = (lambda keys: keys["dflash_config"]) if plain == "dflash" else (lambda keys: keys)
            assert inside(vllm)["target_layer_ids"] == inside(sglang)["target_layer_ids"] == [1, 4, 6]
            assert table["aux_hidden_state_layer_ids"] == [2, 5, 7]


def test_the_anchor_and_the_block_are_said_as_each_engine_counts(drafted: Callable[..., Any], tmp_path: Path) -> None:
    plain = {name: _exported(drafted, "dflash", name, tmp_path / "a")[0] for name in FORMATS}
    assert plain["vllm"]["architectures"] == plain["sglang"]["architectures"] == ["DFlashDraftModel"]
    assert [plain[name]["block_size"] for name in FORMATS] == [4, 4, 4]
    assert plain["speculators"]["sample_from_anchor"] is False
    assert plain["speculators"]["sliding_window_non_causal"] is True
    later = {name: _exported(drafted, "dspark, anchor predicts nothing", name, tmp_path / "b")[0] for name in FORMATS}
    assert [later[name]["sample_from_anchor"] for name in FORMATS] == [False, False, False]
    assert [later[name]["block_size"] for name in FORMATS] == [4, 3, 4], "SGLang counts drafts"
    first = {name: _exported(drafted, "dspark", name, tmp_path / "c")[0] for name in FORMATS}
    assert [first[name]["sample_from_anchor"] for name in FORMATS] == [True, True, True]
    assert [first[name]["block_size"] for name in FORMATS] == [4, 4, 4]


def test_a_dflash_draft_whose_anchor_predicts_is_a_dspark_draft_with_nothing_in_its_head(
    drafted: Callable[..., Any], tmp_path: Path
) -> None:
    for name in FORMATS:
        config, folder = _exported(drafted, "dflash, anchor predicts", name, tmp_path)
        weights = load_file(folder / "model.safetensors")
        assert config["architectures"] == ["DSparkSpeculator" if name == "speculators" else "Qwen3DSparkModel"]
        assert config["markov_rank"] == 1
        assert not weights["markov_head.markov_w1.weight"].any()
        assert not weights["markov_head.markov_w2.weight"].any()
        record = json.loads((folder / "export.json").read_text())
        assert record["served_as"]["method"] == "dspark"
        assert "adds nothing" in " ".join(record["notes"])


def test_a_draft_without_confidence_head_says_how_sglang_serves_it(drafted: Callable[..., Any], tmp_path: Path) -> None:
    for name, says in (("dspark", False), ("dspark, no confidence", True), ("dflash, anchor predicts", True)):
        _, folder = _exported(drafted, name, "sglang", tmp_path / name)
        assert ("default verify mode only" in (folder / "README.md").read_text()) is says
        assert (
            "SGLANG_RAGGED_VERIFY_MODE" in " ".join(json.loads((folder / "export.json").read_text())["notes"])
        ) is says


def test_a_window_slides_over_a_block_that_stays_bidirectional(drafted: Callable[..., Any], tmp_path: Path) -> None:
    for draft in ("dflash, window", "dspark, window"):
        for name in FORMATS:
            config, _ = _exported(drafted, draft, name, tmp_path / draft)
            layers = config.get("transformer_layer_config", config)
            assert layers["layer_types"] == ["sliding_attention"] * 2
            assert layers["sliding_window"] == 6
            assert layers["is_causal"] is False, "engines take sliding layers for causal"
            assert config.get("sliding_window_non_causal", True)


def test_eagle3_says_where_its_hidden_state_is_normed(drafted: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("vllm", "speculators"):
        config, folder = _exported(drafted, "eagle3", name, tmp_path)
        norms = [config[key] for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")]
        assert norms == [False] * 4
        shared = {"embed_tokens.weight", "lm_head.weight"} & set(load_file(folder / "model.safetensors"))
        assert len(shared) == (2 if name == "speculators" else 0)
    assert _exported(drafted, "eagle3", "vllm", tmp_path / "b")[0]["architectures"] == ["Eagle3Qwen3ForCausalLM"]
    llama, _ = _exported(drafted, "eagle3, no head norms", "vllm", tmp_path / "c")
    assert (llama["architectures"], llama["model_type"]) == (["LlamaForCausalLMEagle3"], "llama")
    sglang, _ = _exported(drafted, "eagle3, no head norms", "sglang", tmp_path / "c")
    assert sglang["draft_vocab_size"] is None, "the target's lm_head"


def test_weights_keep_the_type_they_are_stored_in(drafted: Callable[..., Any], tmp_path: Path) -> None:
    made = drafted("dspark", markov={"rank": 6})
    made.draft.load_state_dict({name: value.bfloat16().float() for name, value in made.draft.state_dict().items()})
    stored = evolve(made, facts=evolve(made.facts, config={**made.facts.config, "dtype": "bfloat16"}))
    folder = stored.export("vllm", tmp_path)
    assert {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()} == {"torch.bfloat16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
