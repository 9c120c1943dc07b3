"""A draft goes into every format and comes back: config.json is equal, and every weight bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, fields
from random_targets import SIZES, SMALL, TAPS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from deepspec_core.checkpoints.export_facts import facts_of
from deepspec_core.checkpoints.exports import Format
from deepspec_core.checkpoints.published import save_draft
from deepspec_core.contracts.export import TargetName
from deepspec_core.errors import CheckpointError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import load_target, open_adapter
from deepspec_core.testing.random_batches import with_large_weights
from deepspec_export import gguf_file
from deepspec_export.importing import import_draft

RANK = {"markov": {"rank": 6}}
STYLE = {"layer": {"style": "qwen3", "intermediate_size": 40}}
ALL = ("vllm", "sglang", "speculators")
# The draft, the formats that take it, and a number of training that no format says.
DRAFTS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "dflash": ("dflash", "qwen3", {"anchor_predicts": False}, (*ALL, "z-lab", "gguf")),
    "dflash, anchor predicts": ("dflash", "qwen3", {}, (*ALL, "gguf")),
    "dflash, window": ("dflash", "qwen3", {"anchor_predicts": False, "layer": {"window": 6}}, (*ALL, "z-lab", "gguf")),
    "dflash, yarn": (
        "dflash", "qwen3", {"anchor_predicts": False, "layer": {"rope": {"rope_type": "yarn", "factor": 2.0,
        "original_max_position_embeddings": 128}}}, (*ALL, "z-lab"),
    ),
    "dflash of experts": ("dflash", "qwen3_moe", {"anchor_predicts": False}, ("vllm", "z-lab")),
    "dflash of llama in qwen3's style": ("dflash", "llama", {**STYLE, "anchor_predicts": False}, (*ALL, "z-lab")),
    "dspark": ("dspark", "qwen3", RANK, (*ALL, "gguf")),
    "dspark of gemma4 in qwen3's style": ("dspark", "gemma4", {**STYLE, **RANK}, ("vllm", "speculators")),
    "dspark, plain confidence": ("dspark", "qwen3", {**RANK, "confidence_with_markov": False}, (*ALL, "gguf")),
    "dspark, no confidence": ("dspark", "qwen3", {**RANK, "confidence_head": False}, (*ALL, "gguf")),
    "dspark, no Markov head": (
        "dspark", "qwen3", {"markov": {"rank": 0}, "confidence_with_markov": False}, (*ALL, "gguf")
    ),
    "dspark, anchor predicts nothing": ("dspark", "qwen3", {**RANK, "anchor_predicts": False}, (*ALL, "gguf")),
    "dspark, rnn": ("dspark", "qwen3", {"markov": {"rank": 6, "head": "rnn"}}, ("sglang",)),
    "dspark, gated": ("dspark", "qwen3", {"markov": {"rank": 6, "head": "gated"}}, ("sglang",)),
    "eagle3": ("eagle3", "qwen3", {"num_layers": 1}, ("vllm", "speculators")),
    "eagle3, two layers": ("eagle3", "qwen3", {"num_layers": 2}, ("vllm",)),
    "eagle3, no head norms": ("eagle3", "qwen3", {"num_layers": 1, "qk_norm": False}, (*ALL, "gguf")),
    "eagle3 of llama": ("eagle3", "llama", {"num_layers": 1}, (*ALL, "gguf")),
    "eagle3 of mistral, window": ("eagle3", "mistral", {"num_layers": 1, "layer": {"window": 6}}, ("vllm",)),
    "eagle3 of qwen3 in llama's style": (
        "eagle3", "qwen3", {"num_layers": 1, "layer": {"style": "llama"}}, ("vllm", "sglang"),
    ),
    "eagle3, reduced vocabulary": ("eagle3", "llama", {"num_layers": 1, "vocab_size": 20}, (*ALL, "gguf")),
}  # fmt: skip
# Each format with each algorithm that it takes. The other pairs are slow tests.
FIRST = {
    ("dflash", "z-lab"), ("dflash of llama in qwen3's style", "vllm"), ("dspark, no Markov head", "sglang"),
    ("dspark", "gguf"), ("eagle3", "speculators"), ("eagle3, reduced vocabulary", "gguf"),
}  # fmt: skip
PAIRS = [
    pytest.param(name, form, id=f"{name}-{form}", marks=() if (name, form) in FIRST else pytest.mark.slow)
    for name, (*_, formats) in DRAFTS.items()
    for form in formats
]
# What no format but our own says.
TRAINING = {"num_anchors": 9, "step_decay": 0.7}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """targets(family): the folder of a tiny random target, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("targets") / family
            torch.manual_seed(0)
            config = AutoConfig.for_model({"gemma4": "gemma4_text"}.get(family, family), **SIZES)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few letters, as a GGUF file asks for one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:36]
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate([*letters, "!!"])}, [("!", "!")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<end>", "<mask>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", mask_token="<mask>")


@pytest.fixture
def exported(targets: Callable[[str], Path], registry: Registry, tmp_path: Path) -> Callable[..., Any]:
    """exported(name, format, dtype): the target's folder, a checkpoint of ours, and its export in a format."""

    def make(name: str, form: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Path]:
        algorithm, family, given, _ = DRAFTS[name]
        options = {**SMALL, **TRAINING, **given, "target_name": family}
        where = targets(family)
        layer = LayerOptions(**{"intermediate_size": 40, **options.pop("layer", {})})
        adapter = open_adapter(where, registry=registry, draft_layer=layer)
        spec = registry.get("draft", algorithm)
        assert spec.options is not None
        markov = options.pop("markov", None)
        chosen = spec.options(**{one.name: options[one.name] for one in fields(spec.options) if one.name in options})
        if markov is not None:
            chosen = evolve(chosen, markov=evolve(chosen.markov, **markov))
        torch.manual_seed(1)
        draft = with_large_weights(registry.load("draft", algorithm)(chosen, adapter, TAPS)).eval()
        if draft.vocabulary is not None:
            draft.vocabulary.choose(torch.arange(20) * 2 + 1)
        model = load_target(adapter, where, dtype=torch.float32, device="cpu")
        draft.adopt(model.embedding_weight(), model.head_weight())
        draft.to(dtype)
        save_draft(draft, adapter, tmp_path / "draft")
        facts = facts_of(draft, adapter, target=TargetName(name=family), tokenizer=byte_tokenizer)
        form_of = Format.of(form, algorithm, registry)
        form_of.check(facts, where="a test")
        form_of.write(draft.float(), facts, tmp_path / form)
        return where, tmp_path / "draft", tmp_path / form

    return make


def config_of(folder: Path) -> dict[str, Any]:
    """The keys of a checkpoint."""
    keys: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return keys


def require_same(one: Path, other: Path) -> None:
    """Equal keys, and equal tensors to the last bit."""
    assert config_of(one) == config_of(other)
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert [name for name in first if not _same(first[name], second[name])] == []


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_there_and_back(exported: Callable[..., Any], registry: Registry, tmp_path: Path, name: str, form: str) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    target, ours, folder = exported(name, form)
    imported = import_draft(folder, str(target), tmp_path / "back", registry=registry)
    assert (imported.format, imported.algorithm) == (form, DRAFTS[name][0])
    require_same(ours, tmp_path / "back")
    replay = json.loads((tmp_path / "back" / "import.json").read_text())["verified"]["replay"]
    assert replay["log_probabilities_differ_by"] < 1e-4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("form", ["vllm", "gguf"])
def test_bfloat16_there_and_back(exported: Callable[..., Any], registry: Registry, tmp_path: Path, form: str) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    target, ours, folder = exported("dspark", form, torch.bfloat16)
    import_draft(folder, str(target), tmp_path / "back", registry=registry)
    require_same(ours, tmp_path / "back")


def edited(folder: Path, changes: Mapping[str, Any]) -> Path:
    """Set keys of config.json; those whose value is None are removed."""
    keys = config_of(folder) | changes
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in keys.items() if name not in changes or value is not None})
    )
    return folder


def test_what_only_training_needs_is_assumed_and_said_where_no_record_tells(
    exported: Callable[..., Any], registry: Registry, tmp_path: Path
) -> None:
    target, ours, folder = exported("dflash", "z-lab")
    (folder / "export.json").unlink()
    imported = import_draft(folder, str(target), tmp_path / "back", registry=registry)
    assert config_of(tmp_path / "back") == config_of(ours) | {"num_anchors": 512}
    assert any("num_anchors = 512" in note for note in imported.notes)


def test_a_record_of_other_files_is_not_believed(
    exported: Callable[..., Any], registry: Registry, tmp_path: Path
) -> None:
    target, _, folder = exported("eagle3", "vllm")
    edited(folder, {"norm_output": None})
    imported = import_draft(folder, str(target), tmp_path / "back", registry=registry)
    assert any("export.json beside the draft is of other files" in note for note in imported.notes)
    assert config_of(tmp_path / "back")["step_loss_decay"] == 0.8


@pytest.mark.parametrize("form", ["vllm", "gguf"])
def test_weights_that_were_changed_after_the_export_are_noted(
    exported: Callable[..., Any], registry: Registry, tmp_path: Path, form: str
) -> None:
    if form == "gguf":
        pytest.importorskip("gguf")
    target, _, folder = exported("dspark", form)
    if form == "gguf":
        name, keys, tensors = gguf_file.read(folder / "draft.gguf")
        gguf_file.write(folder / "draft.gguf", name, keys, tensors | {"fc.weight": tensors["fc.weight"] * 1.5})
    else:
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"fc.weight": weights["fc.weight"] * 1.5}, folder / "model.safetensors")
    imported = import_draft(folder, str(target), tmp_path / "back", registry=registry)
    file = {"vllm": "model.safetensors", "gguf": "draft.gguf"}[form]
    assert any(f"export.json beside the draft is of other files than {file} here" in note for note in imported.notes)


def test_a_record_that_says_nothing_of_weights_is_believed(
    exported: Callable[..., Any], registry: Registry, tmp_path: Path
) -> None:
    target, ours, folder = exported("dflash", "vllm")
    record = json.loads((folder / "export.json").read_text())
    del record["sha256"]["model.safetensors"]
    (folder / "export.json").write_text(json.dumps(record))
    import_draft(folder, str(target), tmp_path / "back", registry=registry)
    assert config_of(tmp_path / "back") == config_of(ours)


def test_a_format_that_the_record_contradicts_is_refused(
    exported: Callable[..., Any], registry: Registry, tmp_path: Path
) -> None:
    """Of a draft whose block vLLM and SGLang count differently."""
    target, ours, folder = exported("dspark, anchor predicts nothing", "vllm")
    with pytest.raises(CheckpointError, match="give --format vllm") as refused:
        import_draft(folder, str(target), tmp_path / "back", registry=registry, format_name="sglang")
    assert "export.json" in str(refused.value)
    import_draft(folder, str(target), tmp_path / "back", registry=registry, format_name="vllm")
    require_same(ours, tmp_path / "back")


def test_a_format_of_other_files_is_refused(exported: Callable[..., Any], registry: Registry, tmp_path: Path) -> None:
    target, _, folder = exported("dspark", "vllm")
    with pytest.raises(CheckpointError, match=r"a folder without draft\.gguf"):
        import_draft(folder, str(target), tmp_path / "back", registry=registry, format_name="gguf")
    (folder / "config.json").rename(folder / "draft.gguf")
    with pytest.raises(CheckpointError, match=r"a folder with draft\.gguf and without config\.json"):
        import_draft(folder, str(target), tmp_path / "back", registry=registry, format_name="vllm")


def test_a_checkpoint_of_ours_needs_no_import(exported: Callable[..., Any], registry: Registry, tmp_path: Path) -> None:
    target, _, folder = exported("dspark", "deepspec")
    with pytest.raises(CheckpointError, match="needs no import") as refused:
        import_draft(folder, str(target), tmp_path / "back", registry=registry)
    assert "--format" not in str(refused.value)
