"""Published checkpoints: read as they are, written the same, told from DFlash's; run files with the nested options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.checkpoints.published import read_draft_config, save_draft
from deepspec_core.config.load import load_run_file
from deepspec_core.config.render import render
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.errors import CheckpointError, ConfigError
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.driven_proposer import check_same_proposals
from deepspec_core.testing.recorded import Recordings, check_same_weights
from deepspec_dspark.model import DSparkModel
from deepspec_dspark.options import DSparkOptions, MarkovOptions, options_of

RUN_FILE = Path(__file__).parents[2] / "examples" / "quickstart" / "dspark.toml"


@pytest.mark.parametrize("case", ["vanilla", "gated", "rnn", "confidence-plain"])
def test_a_published_checkpoint_survives_a_round_trip(
    family: str, recordings: Recordings, tmp_path: Path, case: str
) -> None:
    model, original = (of(f"{family}-dspark-{case}") for of in (recordings.draft, recordings.checkpoint))
    assert isinstance(model, DSparkModel)
    assert model.describe().class_name == read_draft_config(original)["architectures"][0]
    save_draft(model, recordings.adapter(family), tmp_path / "copy")
    assert len({path.stat().st_mode for path in (tmp_path / "copy").iterdir()}) == 1, "others read the weights too"
    check_same_weights(tmp_path / "copy", original)
    config, recorded = read_draft_config(tmp_path / "copy"), read_draft_config(original)
    own = {"architectures", *model.config()} - {"sample_from_anchor"}
    assert {key: config[key] for key in own} == {key: recorded[key] for key in own}
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
    make_model: Callable[..., DSparkModel],
    tmp_path: Path,
    recordings: Recordings,
    reloaded: Callable[..., DraftModel],
    shape: dict[str, Any],
) -> None:
    model = make_model(**shape)
    loaded = reloaded(model, recordings.adapter("qwen3"), tmp_path / "draft")
    assert isinstance(loaded, DSparkModel)
    assert loaded.options == model.options
    assert loaded.describe() == model.describe()
    check_same_proposals(loaded, model)


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
    recordings: Recordings, registry: Registry, changes: dict[str, Any], expected: str
) -> None:
    config = read_draft_config(recordings.checkpoint("qwen3-dspark-vanilla")) | changes
    assert registry.recognise(config).name == expected


def test_recorded_dflash_checkpoints_are_not_ours(recordings: Recordings, registry: Registry) -> None:
    for case in ("qwen3-dflash", "gemma4-dflash"):
        assert registry.recognise(read_draft_config(recordings.checkpoint(case))).name == "dflash"


@pytest.mark.parametrize("key", ["markov_rank", "markov_head_type", "confidence_head_with_markov", "block_size"])
def test_a_missing_key_is_named(recordings: Recordings, key: str) -> None:
    config = read_draft_config(recordings.checkpoint("qwen3-dspark-vanilla"))
    del config[key]
    with pytest.raises(CheckpointError, match=f"(?s)lacks a key of a DSpark draft.*{key}"):
        options_of(config)


@pytest.mark.parametrize(
    "changes", [{"markov_head_type": "wide"}, {"markov_rank": -1}, {"markov_rank": "6"}, {"enable_confidence_head": 1}]
)
def test_a_key_that_makes_no_sense_is_refused(recordings: Recordings, changes: dict[str, Any]) -> None:
    config = read_draft_config(recordings.checkpoint("qwen3-dspark-vanilla")) | changes
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


def test_what_no_checkpoint_says_is_said_by_run_files_only(recordings: Recordings) -> None:
    config = read_draft_config(recordings.checkpoint("qwen3-dspark-rnn"))
    assert options_of(config)[0].confidence_gradient == "through"
