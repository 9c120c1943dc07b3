"""Published checkpoints: read as they are, written the same, told from DFlash's; run files with the nested options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepspec_core.blocks.published import load_draft, read_draft_config, save_draft
from deepspec_core.config.load import load_run_file
from deepspec_core.config.render import render
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.errors import CheckpointError, ConfigError
from deepspec_core.features.targets import open_adapter
from deepspec_core.plugins import load_plugins
from deepspec_core.registry import Registry
from deepspec_dspark.model import DSparkModel
from deepspec_dspark.options import DSparkOptions, MarkovOptions, options_of

RUN_FILE = Path(__file__).parents[2] / "examples" / "quickstart" / "dspark.toml"


@pytest.mark.parametrize("case", ["vanilla", "gated", "rnn", "confidence-plain"])
def test_a_published_checkpoint_survives_a_round_trip(
    family: str, parity: Path, tmp_path: Path, registry: Registry, adapter: TargetAdapter, case: str
) -> None:
    original, copy = parity / f"{family}-dspark-{case}" / "draft", tmp_path / "copy"
    model = load_draft(original, registry=registry, adapter=adapter)
    assert isinstance(model, DSparkModel)
    assert model.describe().class_name == read_draft_config(original)["architectures"][0]
    save_draft(model, adapter, copy)
    weights, expected = load_file(copy / "model.safetensors"), load_file(original / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    config, recorded = read_draft_config(copy), read_draft_config(original)
    own = {"architectures", *model.config()}
    assert {key: config[key] for key in own - {"sample_from_anchor"}} == {
        key: recorded[key] for key in own - {"sample_from_anchor"}
    }
    assert config["sample_from_anchor"] is True, "written out: engines disagree on what its absence means"


@pytest.mark.parametrize(
    "shape",
    [
        {"head": "vanilla"},
        {"head": "gated", "confidence_with_markov": False},
        {"head": "rnn", "anchor_predicts": False},
        {"head": "rnn", "confidence_head": False, "confidence_with_markov": False},
        {"rank": 0, "confidence_with_markov": False},
    ],
)
def test_proposals_survive_a_round_trip(
    make_model: Callable[..., DSparkModel], tmp_path: Path, parity: Path, registry: Registry, shape: dict[str, Any]
) -> None:
    adapter = open_adapter(parity / "qwen3-target", registry=registry)
    model = make_model(**shape)
    save_draft(model, adapter, tmp_path / "draft")
    loaded = load_draft(tmp_path / "draft", registry=registry, adapter=adapter)
    assert isinstance(loaded, DSparkModel)
    assert loaded.options == model.options
    assert loaded.describe() == model.describe()
    features, prompt = torch.randn(1, 6, 160), torch.randint(2, 60, (1, 6))
    proposals = []
    for one in (model, loaded):
        proposer = one.proposer()
        proposer.open_slots(1, 16)
        slot, uniforms = torch.tensor([0]), torch.full((1, 4), 0.5)
        proposer.start(slot, prompt, torch.tensor([6]), torch.tensor([7]), features)
        proposals.append(proposer.propose(slot, torch.tensor([4]), Sampling(temperature=1.0), uniforms, (1,)))
    for field in ("tokens", "lengths", "probabilities", "confidence"):
        found, expected = (getattr(proposal, field) for proposal in proposals)
        assert found is expected is None or torch.equal(found, expected), field


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "dspark"),
        ({"markov_rank": 0}, "dspark"),
        ({"enable_confidence_head": False}, "dspark"),
        ({"markov_rank": 0, "enable_confidence_head": False}, "dflash"),
        ({"architectures": ["Gemma4DSparkModel"]}, "dspark"),
    ],
)
def test_each_algorithm_recognises_its_own(
    parity: Path, registry: Registry, changes: dict[str, Any], expected: str
) -> None:
    config = read_draft_config(parity / "qwen3-dspark-vanilla" / "draft") | changes
    assert registry.recognise(config).name == expected


def test_recorded_dflash_checkpoints_are_not_ours(parity: Path, registry: Registry) -> None:
    for folder in ("qwen3-dflash", "gemma4-dflash"):
        assert registry.recognise(read_draft_config(parity / folder / "draft")).name == "dflash"


@pytest.mark.parametrize("key", ["markov_rank", "markov_head_type", "confidence_head_with_markov", "block_size"])
def test_a_missing_key_is_named(parity: Path, key: str) -> None:
    config = read_draft_config(parity / "qwen3-dspark-vanilla" / "draft")
    del config[key]
    with pytest.raises(CheckpointError, match=f"(?s)lacks a key of a DSpark draft.*{key}"):
        options_of(config)


@pytest.mark.parametrize(
    "changes", [{"markov_head_type": "wide"}, {"markov_rank": -1}, {"markov_rank": "6"}, {"enable_confidence_head": 1}]
)
def test_a_key_that_makes_no_sense_is_refused(parity: Path, changes: dict[str, Any]) -> None:
    config = read_draft_config(parity / "qwen3-dspark-vanilla" / "draft") | changes
    with pytest.raises(CheckpointError, match="does not describe a DSpark draft"):
        options_of(config)


def test_headless_options_are_refused() -> None:
    with pytest.raises(ValueError, match='type "dflash"'):
        DSparkOptions(markov=MarkovOptions(rank=0), confidence_head=False)
    with pytest.raises(ValueError, match="confidence_with_markov"):
        DSparkOptions(markov=MarkovOptions(rank=0))


def test_the_quickstart_file_round_trips(tmp_path: Path) -> None:
    plugins = load_plugins()
    run_file = load_run_file(RUN_FILE, plugins=plugins)
    assert run_file.draft.options.markov == MarkovOptions(rank=32, head="vanilla")
    assert run_file.loss.terms == {"ce": 0.1, "tv": 0.9, "confidence": 1.0}
    (tmp_path / "again.toml").write_text(render(run_file))
    assert load_run_file(tmp_path / "again.toml", plugins=plugins) == run_file


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("draft.markov.rnak=4", "draft.markov.rnak"),
        ("draft.markov.head=wide", r"(?s)draft\.markov\.head.*vanilla"),
        ('draft.markov.rank="4"', "draft.markov.rank"),
        ("draft.markov.rank=0", r"(?s)draft.*confidence_with_markov"),
        ("draft.confidence_gradient=halt", r"(?s)draft\.confidence_gradient.*stop"),
    ],
)
def test_nested_options_are_read_strictly(setting: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_run_file(RUN_FILE, overrides=[setting], plugins=load_plugins())


def test_what_no_checkpoint_says_is_said_by_run_files_only(parity: Path) -> None:
    config = json.loads((parity / "qwen3-dspark-rnn" / "draft" / "config.json").read_text())
    assert options_of(config)[0].confidence_gradient == "through"
