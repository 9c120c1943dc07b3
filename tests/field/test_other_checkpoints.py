"""A checkpoint of another project is named for what it is, and never read as one of ours."""

import json
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.checkpoints.draft_window import window_of
from deepspec_core.checkpoints.published import read_options
from deepspec_core.cli.main import main
from deepspec_core.errors import CheckpointError
from deepspec_core.plugins.registry import Registry

NAMES = {
    "DSparkSpeculator": ("speculators", "sample_from_anchor"),
    "Eagle3Speculator": ("speculators", "eagle3"),
    "DFlashDraftModel": ("z-lab", "predicts nothing"),
    "DFlash2DraftModel": ("z-lab", "predicts nothing"),
    "LlamaForCausalLMEagle3": ("SpecForge", "eagle3"),
}
# What a reader of ours would take: every key of a published config.
OURS = {
    "block_size": 7, "num_hidden_layers": 1, "num_anchors": 512, "mask_token_id": 5, "target_layer_ids": [1, 3],
    "markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True,
    "confidence_head_with_markov": True, "ttt_length": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_it_is_named(tmp_path: Path, registry: Registry, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name], "model_type": "qwen3", **OURS}))
    with pytest.raises(CheckpointError, match="another project's format") as problem:
        read_options(tmp_path, registry)
    for part in (name, *NAMES[name]):
        assert part in str(problem.value)
    assert main(["checkpoint", "show", str(tmp_path)]) == 2
    assert name in capsys.readouterr().err


OURS_DSPARK = {"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", **OURS, "sample_from_anchor": True}
NEVER_OURS = [
    ("speculators' key under our class name", {"speculators_model_type": "dspark", "sample_from_anchor": None}),
    ("speculators' key, no class name", {"speculators_model_type": "eagle3", "architectures": None}),
    ("two class names", {"architectures": ["DSparkSpeculator", "Qwen3DSparkModel"]}),
    ("two class names, ours first", {"architectures": ["Qwen3DSparkModel", "DSparkSpeculator"]}),
    ("ours and one that nobody knows", {"architectures": ["Qwen3DSparkModel", "Other"]}),
]


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name) for name, changes in NEVER_OURS])
def test_a_mixture_is_never_read_as_ours(tmp_path: Path, registry: Registry, changes: dict[str, Any]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(OURS_DSPARK))
    assert read_options(tmp_path, registry)[0] == "dspark"
    said = {key: value for key, value in {**OURS_DSPARK, **changes}.items() if value is not None}
    config.write_text(json.dumps(said))
    with pytest.raises(CheckpointError) as problem:
        read_options(tmp_path, registry)
    if "Other" not in str(changes):
        assert "another project's format" in str(problem.value)
        assert "speculators" in str(problem.value)
        assert "convert this one" not in str(problem.value)


SLIDES = {"sliding_window": 12, "num_hidden_layers": 3}
WINDOWS = [
    ("ours", {**SLIDES, "layer_types": ["sliding_attention"] * 3, "use_sliding_window": True}, 12),
    ("all layers full", {**SLIDES, "layer_types": ["full_attention"] * 3, "use_sliding_window": True}, None),
    ("off", {**SLIDES, "use_sliding_window": False}, None),
    ("no layer is beyond", {**SLIDES, "use_sliding_window": True, "max_window_layers": 28}, None),
    ("null", {**SLIDES, "sliding_window": None, "use_sliding_window": True}, None),
    ("no layer_types", {**SLIDES, "use_sliding_window": True, "max_window_layers": 0}, "layer_types"),
    ("no layer_types, some layers", {**SLIDES, "use_sliding_window": True, "max_window_layers": 1}, "layer_types"),
    ("a window alone, as Mistral says it", SLIDES, "layer_types"),
    ("off, and sliding", {**SLIDES, "layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "use_sl"),
]


@pytest.mark.parametrize(("keys", "window"), [pytest.param(keys, window, id=name) for name, keys, window in WINDOWS])
def test_a_window_is_said_or_refused(keys: dict[str, Any], window: int | str | None) -> None:
    if isinstance(window, str):
        with pytest.raises(CheckpointError) as problem:
            window_of(keys, Path("config.json"))
        assert window in str(problem.value.where)
    else:
        assert window_of(keys, Path("config.json")) == window
