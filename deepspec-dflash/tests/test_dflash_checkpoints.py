"""Published checkpoints: read as they are, written the same, refused when damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec_core.checkpoints import published
from deepspec_core.checkpoints.published import load_draft, read_draft_config, save_draft
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.errors import CheckpointError
from deepspec_core.testing.driven_proposer import check_same_proposals, sampled_proposal
from deepspec_core.testing.recorded import Recordings, check_same_weights, edit_config
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import is_dflash, options_of

# What a saved config.json may say in other words than the published one.
REWORDED = {"qwen3": {"transformers_version"}, "gemma4": {"transformers_version", "rope_parameters"}}


@pytest.fixture
def checkpoint(recordings: Recordings, tmp_path: Path) -> Path:
    """A copy of a recorded checkpoint, to damage."""
    return recordings.copy("qwen3-dflash", tmp_path / "draft")


def test_a_published_checkpoint_survives_a_round_trip(tmp_path: Path, recordings: Recordings, family: str) -> None:
    original, copy = recordings.checkpoint(f"{family}-dflash"), tmp_path / "new" / "copy"
    before = torch.get_rng_state()
    model = recordings.draft(f"{family}-dflash")
    assert isinstance(model, DFlashModel)
    assert torch.equal(torch.get_rng_state(), before), "loading leaves the caller's random state"
    save_draft(model, recordings.adapter(family), copy)
    check_same_weights(copy, original)
    config, recorded = read_draft_config(copy), read_draft_config(original)
    changed = {key for key, value in recorded.items() if config.get(key) != value}
    assert changed <= REWORDED[family]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["copy"], "no unfinished folder stays"


def test_proposals_survive_a_round_trip(
    make_model: Callable[..., DFlashModel],
    tmp_path: Path,
    reloaded: Callable[..., DraftModel],
    recordings: Recordings,
) -> None:
    model = make_model(block_size=5, num_layers=1)
    loaded = reloaded(model, recordings.adapter("qwen3"), tmp_path / "draft")
    assert isinstance(loaded, DFlashModel)
    assert loaded.options == model.options
    assert loaded.describe() == model.describe()
    check_same_proposals(loaded, model)


def test_dtype_casts_weights_and_nothing_else(recordings: Recordings) -> None:
    model = recordings.draft("qwen3-dflash", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    assert buffers, "rotary frequencies"
    assert all(buffer.dtype == torch.float32 for buffer in buffers.values())
    assert not model.training
    proposal = sampled_proposal(model)
    assert proposal.probabilities is not None
    assert proposal.probabilities.dtype == torch.bfloat16


def test_only_drafts_without_heads_are_recognised(checkpoint: Path) -> None:
    config = read_draft_config(checkpoint)
    assert is_dflash(config)
    assert not is_dflash(config | {"markov_rank": 6})
    assert not is_dflash(config | {"enable_confidence_head": True})
    assert not is_dflash(config | {"architectures": ["Qwen3Eagle3Model"]})
    assert not is_dflash({})
    options, taps = options_of(config)
    assert (options.block_size, options.num_layers, options.num_anchors, options.mask_token_id) == (4, 2, 5, 63)
    assert taps == (0, 2, 3, 5, 6)


def test_an_occupied_folder_is_not_overwritten(model: DFlashModel, tmp_path: Path, recordings: Recordings) -> None:
    (tmp_path / "draft").mkdir()
    save_draft(model, recordings.adapter("qwen3"), tmp_path / "draft")
    with pytest.raises(CheckpointError, match="overwrite"):
        save_draft(model, recordings.adapter("qwen3"), tmp_path / "draft")


def test_a_failed_save_leaves_nothing(
    model: DFlashModel, tmp_path: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(published, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save_draft(model, recordings.adapter("qwen3"), tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def _edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def _truncate(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "no draft checkpoint in this directory"),
        (lambda path: (path / "config.json").unlink(), "no draft checkpoint in this directory"),
        (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda path: (path / "config.json").write_text("[]"), "found:    list"),
        (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json cannot be read"),
        (lambda path: edit_config(path, architectures=["LlamaModel"]), "no installed algorithm recognises"),
        (lambda path: edit_config(path, block_size=None), "expected: 'block_size'"),
        (lambda path: edit_config(path, block_size="four"), "does not describe a DFlash draft"),
        (lambda path: edit_config(path, block_size=0), "does not describe a DFlash draft"),
        (lambda path: edit_config(path, target_layer_ids=3), "does not describe a DFlash draft"),
        (lambda path: (path / "model.safetensors").unlink(), "has no weights"),
        (lambda path: (path / "model.safetensors").write_bytes(b"not a checkpoint"), "weights cannot be read"),
        (_truncate, "weights cannot be read"),
        (lambda path: _edit_weights(path, lambda w: w.pop("fc.weight")), "missing: fc.weight"),
        (lambda path: _edit_weights(path, lambda w: w.update(extra=torch.ones(1))), "unexpected: extra"),
        (
            lambda path: _edit_weights(path, lambda w: w.update({"norm.weight": torch.ones(3)})),
            r"of another shape: norm.weight \[3\], expected \[32\]",
        ),
        (lambda path: edit_config(path, num_hidden_layers=3), "missing: layers.2.input_layernorm.weight"),
    ],
)
def test_damage_is_named(
    checkpoint: Path, recordings: Recordings, damage: Callable[[Path], object], expected: str
) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=expected) as error:
        load_draft(checkpoint, registry=recordings.registry, adapter=recordings.adapter("qwen3"))
    assert str(checkpoint) in str(error.value), "says where"
