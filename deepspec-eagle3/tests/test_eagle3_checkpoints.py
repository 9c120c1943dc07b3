"""Published checkpoints: read as they are, written the same, recognised and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepspec_core.checkpoints.published import load_draft, read_draft_config, save_draft
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.errors import CheckpointError
from deepspec_core.testing.driven_proposer import check_same_proposals, sampled_proposal
from deepspec_core.testing.recorded import Recordings, check_same_weights
from deepspec_eagle3.model import Eagle3Model
from deepspec_eagle3.options import Eagle3Options, is_eagle3, options_of

PUBLISHED = {
    "target_layer_ids", "num_target_layers", "ttt_length", "step_loss_decay", "draft_num_hidden_layers",
    "target_model_name_or_path",
}  # fmt: skip


def test_a_published_checkpoint_survives_a_round_trip(tmp_path: Path, recordings: Recordings, family: str) -> None:
    model, original = (of(f"{family}-eagle3") for of in (recordings.draft, recordings.checkpoint))
    assert isinstance(model, Eagle3Model)
    save_draft(model, recordings.adapter(family), tmp_path / "copy")
    check_same_weights(tmp_path / "copy", original)
    config, recorded = read_draft_config(tmp_path / "copy"), read_draft_config(original)
    for key in (*PUBLISHED, "architectures", "num_hidden_layers", "layer_types", "tie_word_embeddings", "dtype"):
        assert config[key] == recorded[key], key
    assert "qk_norm" not in config
    assert config["target_model_name_or_path"] == f"tiny-{family}"


@pytest.mark.parametrize(
    "options",
    [
        {"ttt_length": 3, "step_decay": 0.5, "num_layers": 2, "qk_norm": False},
        {"ttt_length": 5, "target_name": "somebody/some-target"},
    ],
)
def test_proposals_survive_a_round_trip(
    make_model: Callable[..., Eagle3Model],
    tmp_path: Path,
    reloaded: Callable[..., DraftModel],
    recordings: Recordings,
    family: str,
    options: dict[str, Any],
) -> None:
    model = make_model(family=family, taps=(1, 4), **options)
    loaded = reloaded(model, recordings.adapter(family), tmp_path / "draft")
    config = read_draft_config(tmp_path / "draft")
    assert config.keys() >= PUBLISHED
    assert isinstance(loaded, Eagle3Model)
    assert loaded.options == model.options
    assert loaded.describe() == model.describe()
    names = load_file(tmp_path / "draft" / "model.safetensors").keys()
    assert "layers.0.hidden_norm.weight" in names
    assert "hidden_norm.weight" not in names
    assert ("layers.0.self_attn.q_norm.weight" in names) == options.get("qk_norm", True)
    check_same_proposals(loaded, model)


def test_the_target_is_named(make_model: Callable[..., Eagle3Model], recordings: Recordings) -> None:
    adapter = recordings.adapter("qwen3")
    assert adapter.architecture.name.endswith("qwen3-target")
    assert make_model().config()["target_model_name_or_path"] == adapter.architecture.name
    assert make_model(target_name="a/b").config()["target_model_name_or_path"] == "a/b"


def test_a_bfloat16_draft_decodes(recordings: Recordings, family: str) -> None:
    proposal = sampled_proposal(recordings.draft(f"{family}-eagle3", dtype=torch.bfloat16))
    assert proposal.probabilities is not None
    assert proposal.probabilities.dtype == torch.bfloat16
    assert proposal.lengths.tolist() == [3]


def test_only_its_own_are_recognised(recordings: Recordings) -> None:
    for family in ("qwen3", "gemma4"):
        config = read_draft_config(recordings.checkpoint(f"{family}-eagle3"))
        assert is_eagle3(config)
        options, taps = options_of(config)
        assert options == Eagle3Options(ttt_length=3, target_name=f"tiny-{family}")
        assert taps == (0, 2, 3, 5, 6)
    assert not is_eagle3(read_draft_config(recordings.checkpoint("qwen3-dflash")))
    assert not is_eagle3({"architectures": ["Qwen3DSparkModel"], "ttt_length": 7})
    assert not is_eagle3({"architectures": ["LlamaForCausalLMEagle3"]})
    assert not is_eagle3({})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ttt_length": None}, "expected: 'ttt_length'"),
        ({"step_loss_decay": None}, "expected: 'step_loss_decay'"),
        ({"ttt_length": "seven"}, "does not describe an Eagle3 draft"),
        ({"draft_num_hidden_layers": 0}, "does not describe an Eagle3 draft"),
        ({"step_loss_decay": -1}, "does not describe an Eagle3 draft"),
        ({"target_layer_ids": 3}, "does not describe an Eagle3 draft"),
        ({"target_layer_ids": [1, 2]}, r"of another shape: fc.weight \[32, 160\], expected \[32, 64\]"),
        ({"draft_num_hidden_layers": 2}, "num_hidden_layers is 1, draft_num_hidden_layers 2"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, draft_num_hidden_layers 1"),
        (
            {"num_hidden_layers": 2, "draft_num_hidden_layers": 2},
            "missing: layers.1.input_layernorm.weight",
        ),
        ({"qk_norm": False}, "unexpected: layers.0.self_attn.k_norm.weight"),
    ],
)
def test_damage_is_named(tmp_path: Path, recordings: Recordings, changes: dict[str, object], expected: str) -> None:
    path = recordings.copy("qwen3-eagle3", tmp_path / "draft", **changes)
    with pytest.raises(CheckpointError, match=expected) as error:
        load_draft(path, registry=recordings.registry, adapter=recordings.adapter("qwen3"))
    assert str(path) in str(error.value), "says where"
