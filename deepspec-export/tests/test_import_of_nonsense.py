"""What a foreign draft cannot mean is refused at once, with the key; another target than it names is noted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_targets import SIZES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from deepspec_core.errors import DeepSpecError
from deepspec_core.plugins.registry import Registry
from deepspec_export.importing import import_draft

Z_LAB = ("z-lab", "dflash", {"anchor_predicts": False})
VLLM = ("vllm", "eagle3", {"num_layers": 1})
REDUCED = ("vllm", "eagle3", {"num_layers": 1, "vocab_size": 20})
SPECULATORS = ("speculators", "eagle3", {"num_layers": 1})
Make = Callable[[tuple[str, str, dict[str, Any]]], Path]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target of the family qwen3."""
    folder = tmp_path_factory.mktemp("targets") / "target"
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exports are kept for all tests."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def foreign(drafted: Callable[..., Any], kept: Path, tmp_path: Path) -> Make:
    """A copy of an export, with what our exporter writes beside it."""

    def make(which: tuple[str, str, dict[str, Any]]) -> Path:
        form, algorithm, options = which
        whole = kept / "-".join([form, algorithm, *options])
        if not whole.exists():
            made = drafted(algorithm, **options)
            if made.draft.vocabulary is not None:
                made.draft.vocabulary.choose(torch.arange(20) * 2 + 1)
            made.export(form, whole)
        return Path(shutil.copytree(whole / form, tmp_path / "foreign"))

    return make


def edit(folder: Path, changes: dict[str, Any], name: str = "config.json") -> None:
    """Set keys of a JSON file; `table.key` is a key of a table."""
    keys = json.loads((folder / name).read_text())
    for path, value in changes.items():
        *tables, key = path.split(".")
        inner = keys
        for table in tables:
            inner = inner[table]
        inner[key] = value
    (folder / name).write_text(json.dumps(keys))


def refused(folder: Path, target: Path, registry: Registry, tmp_path: Path) -> str:
    """What the import says against the draft; it writes nothing."""
    with pytest.raises(DeepSpecError) as error:
        import_draft(folder, str(target), tmp_path / "ours", registry=registry)
    assert error.value.exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} == {"foreign"}
    return str(error.value)


EDITS: list[tuple[tuple[str, str, dict[str, Any]], str, tuple[Any, ...]]] = [
    (Z_LAB, "num_hidden_layers", (10**12, 0, "abc", None, [], {}, True, 2.5)),
    (Z_LAB, "num_target_layers", (36, 7, 10**12, "abc", [])),
    (Z_LAB, "num_attention_heads", (None, {}, 0, 3, 10**9)),
    (Z_LAB, "num_key_value_heads", ([], -2, 3)),
    (Z_LAB, "head_dim", ({}, [], 0, 7, "8")),
    (Z_LAB, "draft_vocab_size", ("abc", 10**12, 49, [], {}, 0)),
    (Z_LAB, "max_position_embeddings", (0, -1, 10**12, "many", [])),
    (Z_LAB, "sliding_window", (-3, 0, "six", [])),
    (Z_LAB, "layer_types", ("abc", [[]], [1, 2], ["sliding_attention"] * 2)),
    (Z_LAB, "rope_parameters", ([], "abc", {"rope_theta": None}, {"rope_theta": "x"}, {"rope_type": []})),
    (Z_LAB, "rope_parameters", ({"rope_type": "nosuch", "rope_theta": 1e4}, {"rope_type": "yarn", "rope_theta": 1e4})),
    (Z_LAB, "rms_norm_eps", (None, "small", -1e-6, [])),
    (Z_LAB, "hidden_act", (None, 3, [])),
    (Z_LAB, "is_causal", ("false", 2, [])),
    (Z_LAB, "architectures", ([[]], [{}], "abc", [], None)),
    (Z_LAB, "block_size", (0, 1, 10**9, "16", [])),
    (Z_LAB, "dflash_config", ([], "abc", {"target_layer_ids": [1]})),
    (Z_LAB, "dflash_config.target_layer_ids", ("abc", ["a", "b"], [[2], 4], [], [10**12], None, {})),
    (Z_LAB, "dflash_config.mask_token_id", ("abc", -1, 48, None, [])),
    (VLLM, "eagle_aux_hidden_state_layer_ids", ("abc", ["a", 2, 3], None, 5)),
    (VLLM, "eagle_config", ([], "abc")),
    (VLLM, "norm_before_fc", ("no", [])),
    (SPECULATORS, "transformer_layer_config", ([], "abc", None)),
    (SPECULATORS, "transformer_layer_config.num_hidden_layers", (10**12, "abc")),
    (SPECULATORS, "speculators_config", ([], None, {"proposal_methods": [3]}, {"proposal_methods": {}})),
    (SPECULATORS, "speculators_config.proposal_methods", ([{"speculative_tokens": "abc"}], [{}])),
    (SPECULATORS, "speculators_config.verifier", ([], {"name_or_path": 5})),
    (SPECULATORS, "speculators_model_type", ([], "abc", None)),
]
ONE_BY_ONE = [
    pytest.param(which, key, value, id=f"{which[0]}-{key}-{value}") for which, key, values in EDITS for value in values
]


@pytest.mark.parametrize(("which", "key", "value"), ONE_BY_ONE)
def test_a_value_that_none_can_mean_is_refused(
    foreign: Make, target: Path, registry: Registry, tmp_path: Path, which: Any, key: str, value: Any
) -> None:
    folder = foreign(which)
    (folder / "export.json").unlink()
    edit(folder, {key: value})
    assert "config.json" in refused(folder, target, registry, tmp_path)


@pytest.mark.parametrize("value", [["vllm"], {"a": 1}, {}, None, 3])
def test_a_format_that_is_no_name_is_refused(
    foreign: Make, target: Path, registry: Registry, tmp_path: Path, value: Any
) -> None:
    folder = foreign(VLLM)
    edit(folder, {"format": value}, "export.json")
    assert "export.json: format" in refused(folder, target, registry, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("ttt_length", "abc"), ("ttt_length", 10**12), ("step_loss_decay", "abc"), ("ttt_length", None)]
)
def test_what_an_export_says_of_training_is_checked(
    foreign: Make, target: Path, registry: Registry, tmp_path: Path, key: str, value: Any
) -> None:
    folder = foreign(VLLM)
    edit(folder, {f"checkpoint.{key}": value}, "export.json")
    assert key.removeprefix("step_loss_") in refused(folder, target, registry, tmp_path)


MAPS: list[tuple[tuple[str, str, dict[str, Any]], str, Callable[[Weights], torch.Tensor]]] = [
    (REDUCED, "d2t", lambda weights: torch.tensor(1)),
    (REDUCED, "d2t", lambda weights: weights["d2t"][:, None]),
    (REDUCED, "d2t", lambda weights: weights["d2t"][:0]),
    (REDUCED, "d2t", lambda weights: weights["d2t"].float()),
    (VLLM, "d2t", lambda weights: torch.zeros(0, dtype=torch.int64)),
    (VLLM, "d2t", lambda weights: torch.zeros(3, dtype=torch.int64)),
    (REDUCED, "t2d", lambda weights: torch.tensor(True)),
    (REDUCED, "t2d", lambda weights: weights["t2d"][None]),
    (REDUCED, "t2d", lambda weights: weights["t2d"].float()),
]


@pytest.mark.parametrize(("which", "name", "change"), MAPS)
def test_a_vocabulary_in_another_shape_is_refused(
    foreign: Make, target: Path, registry: Registry, tmp_path: Path, which: Any, name: str,
    change: Callable[[Weights], torch.Tensor],
) -> None:  # fmt: skip
    folder = foreign(which)
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights | {name: change(weights).contiguous()}, folder / "model.safetensors")
    assert f"where:    {name}" in refused(folder, target, registry, tmp_path)


def test_another_target_than_the_draft_names_is_noted(
    foreign: Make, target: Path, registry: Registry, tmp_path: Path
) -> None:
    folder = foreign(SPECULATORS)
    edit(folder, {"speculators_config.verifier.name_or_path": "org/another"})
    own = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    weights = load_file(folder / "model.safetensors")
    same = "the draft says that its target is org/another, and target was given"
    assert same in notes_of(folder, target, registry, tmp_path / "a")
    edit(folder, {"speculators_config.verifier.name_or_path": "someone/Target"})
    for embedding, noted in ((own, 0), (own + 1, 1)):
        save_file(weights | {"embed_tokens.weight": embedding}, folder / "model.safetensors")
        notes = notes_of(folder, target, registry, tmp_path / f"b{noted}")
        assert sum("says that its target" in note for note in notes) == 0
        assert sum("embed_tokens.weight is not the target's" in note for note in notes) == noted


def notes_of(folder: Path, target: Path, registry: Registry, out: Path) -> tuple[str, ...]:
    """What an import notes, in its message and in import.json."""
    imported = import_draft(folder, str(target), out, registry=registry)
    assert json.loads((out / "import.json").read_text())["notes"] == list(imported.notes)
    return imported.notes
