"""Every recipe is a valid run file, checked without a network, and its numbers are the published ones of this table."""

import re
import socket
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.pipeline.fingerprint import flatten
from deepspec_core.plugins.discovery import load_plugins

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
PLUGINS = load_plugins()

# Published: target -> Hub id, tapped layers, mask token, vocabulary, how its makers sample it.
QWEN3_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
TARGETS: dict[str, dict[str, Any]] = {
    "qwen3-4b": {"model": "Qwen/Qwen3-4B", "layers": [1, 9, 17, 25, 33], "mask": 151669},
    "qwen3-8b": {"model": "Qwen/Qwen3-8B", "layers": [1, 9, 17, 25, 33], "mask": 151669},
    "qwen3-14b": {"model": "Qwen/Qwen3-14B", "layers": [1, 10, 19, 28, 37], "mask": 151669},
    "gemma4-12b": {"model": "google/gemma-4-12B-it", "layers": [5, 17, 29, 41, 46], "mask": 4},
}
SAMPLING = {"qwen3": QWEN3_SAMPLING, "gemma4": {"temperature": 1.0, "top_p": 0.95, "top_k": 64, "min_p": 0.0}}
COMMON = {
    "run.stages": ["regenerate", "train", "evaluate"],
    "data.sources": [{"path": "mlabonne/open-perfectblend", "weight": 1.0, "split": None, "limit": None}],
    "data.max_length": 4096, "data.held_out": 0.05, "data.min_supervised_tokens": 14, "data.system_prompt": None,
    "data.supervise_newline": False, "data.supervise_think_block": False,
    "regenerate.thinking": False, "regenerate.max_tokens": 4096, "features.mode": "online",
    "train.lr": 6e-4, "train.global_batch_size": 512, "train.epochs": 10, "train.max_steps": None,
    "train.warmup": 0.04, "train.weight_decay": 0.0, "train.betas": [0.9, 0.999], "train.clip_norm": 1.0,
    "train.precision": "bfloat16", "train.checkpoint_every": 3000,
    "evaluate.temperature": [1.0], "evaluate.max_new_tokens": 2048, "evaluate.seed": 980406,
    "evaluate.confidence_threshold": 0.0,
}  # fmt: skip
BLOCK = {"draft.block_size": 7, "draft.num_layers": 5, "draft.num_anchors": 512, "draft.anchor_predicts": True}
DECAY = {"loss.weighting.type": "decay", "loss.weighting.gamma": 4.0, "run.seed": 42}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "dspark": {
        **BLOCK, **DECAY, "draft.markov.rank": 256, "draft.markov.head": "vanilla", "draft.confidence_head": True,
        "draft.confidence_with_markov": True, "draft.confidence_gradient": "through",
        "loss.terms.ce": 0.1, "loss.terms.tv": 0.9, "loss.terms.confidence": 1.0,
    },
    "dflash": {**BLOCK, **DECAY, "loss.terms.ce": 1.0},
    "eagle3": {
        "draft.ttt_length": 7, "draft.step_decay": 0.8, "draft.num_layers": 1, "draft.normaliser": "sequence",
        "draft.qk_norm": True, "run.seed": 0, "loss.terms.soft_ce": 1.0, "loss.weighting.type": "uniform",
    },
}  # fmt: skip
# What a variant changes on purpose.
VARIANTS: dict[str, dict[str, Any]] = {
    "dspark-qwen3-4b-thinking": {
        "regenerate.thinking": True, "regenerate.temperature": 0.6, "regenerate.top_p": 0.95,
        "regenerate.max_tokens": 8192, "data.max_length": 8192, "evaluate.max_new_tokens": 8192,
    },
    "dflash-qwen3-4b-servable": {"draft.anchor_predicts": False, "draft.block_size": 8},
    "eagle3-qwen3-4b-servable": {"draft.qk_norm": False},
}  # fmt: skip
NAMES = [*(f"{algorithm}-{target}" for algorithm in ALGORITHMS for target in TARGETS), *VARIANTS]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a recipe is checked without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load(name: str) -> RunFile:
    return load_run_file(RECIPES / f"{name}.toml", plugins=PLUGINS)


def parts(name: str) -> tuple[str, str]:
    """The algorithm and the target in a recipe's name."""
    algorithm, _, rest = name.partition("-")
    return algorithm, next(target for target in TARGETS if rest.startswith(target))


def test_every_recipe_is_in_the_table_and_every_published_one_there() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_was_published(name: str) -> None:
    algorithm, target = parts(name)
    facts = TARGETS[target]
    expected = {
        **COMMON,
        **ALGORITHMS[algorithm],
        **{f"regenerate.{key}": value for key, value in SAMPLING[target.split("-")[0]].items()},
        "run.name": name,
        "run.output": f"../../runs/{name}",
        "target.model": facts["model"],
        "target.layers": facts["layers"],
        "draft.type": algorithm,
        **({} if algorithm == "eagle3" else {"draft.mask_token_id": facts["mask"]}),
        **VARIANTS.get(name, {}),
    }
    said = flatten(load(name))
    assert {key: said.get(key) for key in expected} == expected
    terms = {key for key in said if key.startswith("loss.terms.")}
    assert terms == {key for key in expected if key.startswith("loss.terms.")}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipes_draft_can_be_built_for_a_target_of_its_vocabulary(name: str) -> None:
    file = load(name)
    family = parts(name)[1].split("-")[0]
    model_type, vocab_size = {"qwen3": ("qwen3", 151936), "gemma4": ("gemma4_text", 262144)}[family]
    config = AutoConfig.for_model(
        model_type, vocab_size=vocab_size, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, num_hidden_layers=file.target.layers[-1] + 2, hidden_size_per_layer_input=0,
    )  # fmt: skip
    registry = PLUGINS.registry
    adapter = registry.load("target", registry.adapter_for(model_type).name)(config, file.draft.layer)
    with torch.device("meta"):
        draft = registry.load("draft", file.draft.type)(file.draft.options, adapter, file.target.layers)
    assert draft.describe().max_tokens == 7


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_every_published_number_itself(name: str) -> None:
    """Defaults may move; a recipe does not."""
    written = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    silent = {"run.seed", "evaluate.seed", "evaluate.confidence_threshold", "data.system_prompt", "train.max_steps"}
    silent |= {"data.supervise_newline", "data.supervise_think_block"}
    for key in (COMMON.keys() | ALGORITHMS[parts(name)[0]].keys()) - silent:
        place: Any = written
        for word in key.split("."):
            assert word in place, f"{name} leaves {key} to the default"
            place = place[word]


def test_the_page_names_keys_that_exist() -> None:
    page = (RECIPES / "README.md").read_text()
    known = {key for algorithm in ALGORITHMS for key in flatten(load(f"{algorithm}-qwen3-4b"))}
    named = set(re.findall(r"`((?:run|data|features|draft|train|evaluate|loss|regenerate)\.\w+)", page))
    assert len(named) > 8
    assert {key for key in named if not any(other == key or other.startswith(f"{key}.") for other in known)} == set()
    assert all(f"({name}.toml)" in page for name in NAMES)
