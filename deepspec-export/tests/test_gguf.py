"""The format `gguf`: what llama.cpp reads of it is the draft; what it cannot serve is refused.

The package gguf reads the file back; llama.cpp itself is asked in tests/test_served_by_llama_cpp.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepspec_core.checkpoints.published import published_weights
from deepspec_core.errors import CheckpointError, ExportError
from deepspec_core.layers.draft_vocabulary import KEY as DRAFT_IDS
from deepspec_export import gguf_file, gguf_tokenizer, llama_cpp
from deepspec_export.foreign import read_foreign
from deepspec_export.served import draft_as_served
from deepspec_export.verification import verify_file

gguf = pytest.importorskip("gguf")

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RANK = {"markov": {"rank": 6}}
LLAMA = {"num_layers": 1}
DRAFTS = {
    "dflash": ("dflash", "qwen3", {"anchor_predicts": False}),
    "dflash, anchor predicts": ("dflash", "qwen3", {}),
    "dflash, window": ("dflash", "qwen3", {"anchor_predicts": False, "layer": {"window": 6}}),
    "dflash of llama in qwen3's style": ("dflash", "llama", {"anchor_predicts": False, "layer": {"style": "qwen3"}}),
    "dspark": ("dspark", "qwen3", RANK),
    "dspark, plain confidence": ("dspark", "qwen3", {**RANK, "confidence_with_markov": False}),
    "dspark, no confidence": ("dspark", "qwen3", {**RANK, "confidence_head": False}),
    "dspark, anchor predicts nothing": ("dspark", "qwen3", {**RANK, "anchor_predicts": False}),
    "eagle3, no head norms": ("eagle3", "qwen3", {**LLAMA, "qk_norm": False}),
    "eagle3 of llama": ("eagle3", "llama", LLAMA),
    "eagle3 of mistral in llama's style": ("eagle3", "mistral", {**LLAMA, "layer": {"style": "llama"}}),
    "eagle3, reduced vocabulary": ("eagle3", "llama", {**LLAMA, "vocab_size": 20}),
}


def tokenizer_of(pattern: str = QWEN2) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 40 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:36]
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate([*letters, "!!"])}, [("!", "!")]))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>", "<mask>"])
    made.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", mask_token="<mask>")


@pytest.fixture
def spoken(drafted: Callable[..., Any]) -> Callable[..., Any]:
    """spoken(algorithm, family, **options): `drafted`, whose target has a tokenizer."""

    def make(algorithm: str, family: str, tokenizer: Any = None, **options: Any) -> Any:
        made = drafted(algorithm, family, **options)
        given = tokenizer_of() if tokenizer is None else tokenizer
        return evolve(made, facts=evolve(made.facts, tokenizer=lambda: given))

    return make


@pytest.mark.parametrize("name", DRAFTS)
def test_the_file_was_read_back_and_replayed(spoken: Callable[..., Any], tmp_path: Path, name: str) -> None:
    algorithm, family, options = DRAFTS[name]
    made = spoken(algorithm, family, **options)
    folder = made.export("gguf", tmp_path)
    assert {path.name for path in folder.iterdir()} == {"draft.gguf", "export.json", "README.md"}
    record = json.loads((folder / "export.json").read_text())
    assert record["verified"]["replay"]["log_probabilities_differ_by"] < 1e-4
    assert record["verified"]["conventions"]["feature_layers"] == [1, 4, 6]
    assert list(record["sha256"]) == ["draft.gguf"]
    method = (
        "eagle3" if algorithm == "eagle3" else "dspark" if "predicts" in name or algorithm == "dspark" else "dflash"
    )
    assert (
        f"--spec-type draft-{method} --spec-draft-n-max {made.facts.description.max_tokens}"
        in (folder / "README.md").read_text()
    )


def _file(folder: Path) -> Any:
    return gguf.GGUFReader(folder / "draft.gguf")


def test_what_llama_cpp_reads_of_dspark(spoken: Callable[..., Any], tmp_path: Path) -> None:
    file = _file(spoken("dspark", "qwen3", **RANK).export("gguf", tmp_path))
    keys = {name: field.contents() for name, field in file.fields.items()}
    assert keys["general.architecture"] == "dflash"
    assert keys["dflash.target_layers"] == [2, 5, 7], "the inputs of the layers behind"
    assert (keys["dflash.block_size"], keys["dflash.sample_from_anchor"]) == (4, True)
    assert (keys["dflash.attention.causal"], keys["dflash.has_confidence_head"]) == (False, True)
    assert keys["tokenizer.ggml.mask_token_id"] == 47
    assert keys["tokenizer.ggml.pre"] == "qwen2"
    assert keys["tokenizer.ggml.tokens"][36:] == [
        "!!",
        "<end>",
        "<mask>",
        "<tool>",
        *(f"[PAD{n}]" for n in range(40, 48)),
    ]
    assert keys["tokenizer.ggml.token_type"][35:41] == [1, 1, 3, 3, 4, 5]
    assert keys["tokenizer.ggml.merges"] == ["! !"]
    names = {tensor.name for tensor in file.tensors}
    assert {"fc.weight", "enc.output_norm.weight", "markov_w1.weight", "markov_w2.weight", "conf_proj.bias"} <= names
    assert not names & {"token_embd.weight", "output.weight"}, "the target's own are shared"


def test_eagle3_has_rows_of_queries_and_keys_as_llama_does(spoken: Callable[..., Any], tmp_path: Path) -> None:
    made = spoken("eagle3", "llama", **LLAMA, vocab_size=20)
    tensors = {tensor.name: tensor.data for tensor in _file(made.export("gguf", tmp_path)).tensors}
    weights = published_weights(made.draft)
    own = weights["layers.0.self_attn.q_proj.weight"].numpy()
    # Heads of 8: row 1 of a head is rotated with row 5, and stands behind row 0 and its partner, row 4.
    assert (tensors["blk.0.attn_q.weight"][:4] == own[[0, 4, 1, 5]]).all()
    assert (tensors["blk.0.attn_q.weight"][8:10] == own[[8, 12]]).all()
    assert (tensors["d2t"] == weights[DRAFT_IDS].numpy()).all(), "the tokens themselves"


def test_bf16_is_kept_and_norms_are_fp32(spoken: Callable[..., Any], tmp_path: Path) -> None:
    made = spoken("dspark", "qwen3", **RANK)
    made.draft.load_state_dict({name: value.bfloat16().float() for name, value in made.draft.state_dict().items()})
    made = evolve(made, facts=evolve(made.facts, config={**made.facts.config, "dtype": "bfloat16"}))
    types = {one.name: one.tensor_type.name for one in _file(made.export("gguf", tmp_path)).tensors}
    assert types["fc.weight"] == types["markov_w1.weight"] == "BF16"
    assert types["output_norm.weight"] == types["blk.0.attn_q_norm.weight"] == types["conf_proj.bias"] == "F32"


WRONG: list[tuple[str, str, Any, str]] = [
    ("dspark", "dflash.target_layers", [1, 4, 6], "feature_layers"),
    ("dspark", "dflash.block_size", 5, "proposes"),
    ("dspark", "dflash.sample_from_anchor", False, "anchor_predicts"),
    ("dspark", "dflash.attention.causal", True, "block_causal"),
    ("dspark", "tokenizer.ggml.mask_token_id", 3, "mask_token_id"),
    ("dspark", "dflash.rope.freq_base", 1e6, "rope"),
    ("dflash, window", "dflash.attention.sliding_window_pattern", [True, False], "window"),
    ("eagle3 of llama", "eagle3.norm_before_residual", True, "norm_before_residual"),
]


def _parts(made: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any], dict[str, torch.Tensor]]:
    """The draft as written, its weights by published name, and the file's keys and tensors."""
    from deepspec_export.exporter import export_weights

    served = draft_as_served(made.facts)
    stored = llama_cpp.as_written(served)
    weights = llama_cpp.prepared(export_weights(made.draft, served, made.facts, whole=False), served)
    return stored, weights, llama_cpp.fields(stored, made.facts), llama_cpp.named(weights, stored)


@pytest.mark.parametrize(("name", "key", "value", "says"), WRONG)
def test_each_convention_is_compared(
    spoken: Callable[..., Any], tmp_path: Path, name: str, key: str, value: Any, says: str
) -> None:
    algorithm, family, options = DRAFTS[name]
    made = spoken(algorithm, family, **options)
    stored, weights, keys, tensors = _parts(made)
    assert key in keys
    path = tmp_path / "draft.gguf"
    gguf_file.write(path, llama_cpp.architecture(stored), keys | {key: value}, tensors)
    architecture, found_keys, found_tensors = gguf_file.read(path)
    found = llama_cpp.read(architecture, found_keys, found_tensors)
    with pytest.raises(ExportError, match=says):
        verify_file(
            path, found, llama_cpp.published(found_tensors, found), expected=stored, written=weights, draft=made.draft
        )


def test_rows_in_the_order_of_the_checkpoint_are_noticed(spoken: Callable[..., Any], tmp_path: Path) -> None:
    made = spoken("eagle3", "llama", **LLAMA)
    stored, weights, keys, tensors = _parts(made)
    tensors["blk.0.attn_k.weight"] = weights["layers.0.self_attn.k_proj.weight"]
    gguf_file.write(tmp_path / "draft.gguf", "eagle3", keys, tensors)
    architecture, found_keys, found_tensors = gguf_file.read(tmp_path / "draft.gguf")
    found = llama_cpp.read(architecture, found_keys, found_tensors)
    with pytest.raises(ExportError, match=r"k_proj\.weight differs"):
        verify_file(
            tmp_path / "draft.gguf",
            found,
            llama_cpp.published(found_tensors, found),
            expected=stored,
            written=weights,
            draft=made.draft,
        )


REFUSALS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("eagle3", "qwen3", LLAMA, ("no norms of queries and keys", "qk_norm = false", "export to vllm")),
    ("eagle3", "llama", {**LLAMA, "taps": (1, 4)}, ("reads 2", "exactly 3", "target.layers = [a, b, c]")),
    ("eagle3", "llama", {"num_layers": 2}, ("2 layers", "num_layers = 1")),
    ("eagle3", "mistral", {**LLAMA, "layer": {"window": 8}}, ("window of 8", "export to vllm")),
    ("dflash", "llama", {}, ("norms of queries and keys", "an Eagle3 draft")),
    ("dspark", "qwen3", {"markov": {"rank": 6, "head": "rnn"}}, ("rnn", "export to sglang")),
    ("dflash", "qwen3", {"taps": (1, 7)}, ("last layer, 7", "up to 6")),
    ("dflash", "qwen3", {"layer": {"rope": {"rope_type": "linear", "factor": 2.0}}}, ("linear", "not tried")),
]


@pytest.mark.parametrize(("algorithm", "family", "options", "says"), REFUSALS)
def test_refused_with_a_way_out(
    spoken: Callable[..., Any], algorithm: str, family: str, options: dict[str, Any], says: tuple[str, ...]
) -> None:
    reason = spoken(algorithm, family, **options).unservable("gguf")
    assert [part for part in says if part not in (reason or "")] == []


def test_what_the_file_needs_besides(
    spoken: Callable[..., Any], drafted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match=r"fix: .*--target") as refused:
        drafted("dspark", **RANK).unservable("gguf")
    assert str(refused.value).count("fix:") == 1
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0, False)))
    reason = spoken("dspark", "qwen3", pieces, **RANK).unservable("gguf") or ""
    assert "this one is Unigram" in reason
    assert "convert_hf_to_gguf.py" in reason
    monkeypatch.setattr(gguf_file, "is_installed", lambda: False)
    with pytest.raises(ExportError, match=r"fix: .*pip install 'deepspec-export\[gguf\]'"):
        spoken("dspark", "qwen3", **RANK).unservable("gguf")


def test_another_way_to_split_text_is_said(spoken: Callable[..., Any], tmp_path: Path) -> None:
    other = tokenizer_of(r" ?\p{L}+|\p{N}")
    folder = spoken("dspark", "qwen3", other, **RANK).export("gguf", tmp_path)
    assert _file(folder).fields["tokenizer.ggml.pre"].contents() == gguf_tokenizer.DEFAULT
    assert "splits text" in "".join(json.loads((folder / "export.json").read_text())["notes"])


Q = "blk.0.attn_q.weight"
Tensors = dict[str, torch.Tensor]
NONSENSE: list[tuple[dict[str, Any], Callable[[Tensors], Tensors], str]] = [
    ({"block_count": 10**9}, dict, "eagle3.block_count"),
    ({"context_length": 0}, dict, "eagle3.context_length"),
    ({"attention.head_count": "four"}, dict, "eagle3.attention.head_count"),
    ({"target_layers": ["a"]}, dict, "eagle3.target_layers"),
    ({"target_layers": [7, 5, 2]}, dict, "rising order"),
    ({"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]}, dict, "one window"),
    ({}, lambda tensors: {"d2t": tensors["d2t"][:, None]}, "[20, 1] of int64"),
    ({}, lambda tensors: {"d2t": tensors["d2t"].float()}, "[20] of float32"),
    ({}, lambda tensors: {Q: tensors[Q][:31]}, "draft.gguf"),
]


@pytest.mark.parametrize(("keys", "change", "says"), NONSENSE)
def test_a_file_that_cannot_be_meant_is_not_imported(
    spoken: Callable[..., Any], tmp_path: Path, keys: dict[str, Any], change: Callable[[Tensors], Tensors], says: str
) -> None:
    made = spoken("eagle3", "llama", num_layers=1, vocab_size=20)
    folder = made.export("gguf", tmp_path)
    name, before, tensors = gguf_file.read(folder / "draft.gguf")
    after = before | {f"{name}.{key}": value for key, value in keys.items()}
    gguf_file.write(folder / "draft.gguf", name, after, tensors | change(tensors))
    with pytest.raises(CheckpointError) as refused:
        read_foreign(folder, made.adapter.architecture)
    assert says in str(refused.value)
