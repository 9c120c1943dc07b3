"""Published checkpoints: read as they are, written the same, refused when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec_core.blocks import published
from deepspec_core.blocks.published import load_draft, read_draft_config, save_draft
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.errors import CheckpointError
from deepspec_core.registry import Registry
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import is_dflash, options_of
from deepspec_targets.qwen3 import Qwen3Adapter


@pytest.fixture
def checkpoint(parity: Path, tmp_path: Path) -> Path:
    """A copy of a recorded checkpoint, to damage."""
    return Path(shutil.copytree(parity / "qwen3-dflash" / "draft", tmp_path / "draft"))


def _load(path: Path, registry: Registry, adapter: Qwen3Adapter) -> DFlashModel:
    model = load_draft(path, registry=registry, adapter=adapter)
    assert isinstance(model, DFlashModel)
    return model


def test_a_published_checkpoint_survives_a_round_trip(
    parity: Path, tmp_path: Path, registry: Registry, adapter: Qwen3Adapter
) -> None:
    original, copy = parity / "qwen3-dflash" / "draft", tmp_path / "new" / "copy"
    before = torch.get_rng_state()
    model = _load(original, registry, adapter)
    assert torch.equal(torch.get_rng_state(), before), "loading leaves the caller's random state"
    save_draft(model, adapter, copy)
    weights, expected = load_file(copy / "model.safetensors"), load_file(original / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    config, recorded = read_draft_config(copy), read_draft_config(original)
    changed = {key for key, value in recorded.items() if config.get(key) != value}
    assert changed <= {"transformers_version"}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["copy"], "no unfinished folder stays"


def test_proposals_survive_a_round_trip(
    make_model: Callable[..., DFlashModel], tmp_path: Path, registry: Registry, adapter: Qwen3Adapter
) -> None:
    model = make_model(block_size=5, num_layers=1)
    save_draft(model, adapter, tmp_path / "draft")
    loaded = _load(tmp_path / "draft", registry, adapter)
    assert loaded.options == model.options
    assert loaded.describe() == model.describe()
    torch.manual_seed(1)
    features, prompt = torch.randn(1, 6, 160), torch.randint(2, 60, (1, 6))
    proposals = []
    for one in (model, loaded):
        proposer = one.proposer()
        proposer.open_slots(1, 16)
        slot = torch.tensor([0])
        proposer.start(slot, prompt, torch.tensor([6]), torch.tensor([7]), features)
        proposals.append(
            proposer.propose(slot, torch.tensor([5]), Sampling(temperature=1.0), torch.full((1, 5), 0.5), (1,))
        )
    assert torch.equal(proposals[0].tokens, proposals[1].tokens)
    assert torch.equal(proposals[0].probabilities, proposals[1].probabilities)


def test_dtype_casts_weights_and_nothing_else(parity: Path, registry: Registry, adapter: Qwen3Adapter) -> None:
    model = load_draft(parity / "qwen3-dflash" / "draft", registry=registry, adapter=adapter, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    assert buffers, "rotary frequencies"
    assert all(buffer.dtype == torch.float32 for buffer in buffers.values())
    assert not model.training
    proposer = model.proposer()
    proposer.open_slots(1, 16)
    slot, four = torch.tensor([0]), torch.tensor([4])
    proposer.start(slot, torch.ones(1, 4, dtype=torch.long), four, four, torch.randn(1, 4, 160))
    proposal = proposer.propose(slot, four, Sampling(temperature=1.0), torch.full((1, 4), 0.5), (1,))
    assert proposal.probabilities is not None
    assert proposal.probabilities.dtype == torch.float32


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


def test_an_occupied_folder_is_not_overwritten(
    make_model: Callable[..., DFlashModel], tmp_path: Path, adapter: Qwen3Adapter
) -> None:
    (tmp_path / "draft").mkdir()
    save_draft(make_model(), adapter, tmp_path / "draft")
    with pytest.raises(CheckpointError, match="overwrite"):
        save_draft(make_model(), adapter, tmp_path / "draft")


def test_a_failed_save_leaves_nothing(
    make_model: Callable[..., DFlashModel], tmp_path: Path, adapter: Qwen3Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(published, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_draft(make_model(), adapter, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def _edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


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
        (shutil.rmtree, "no draft checkpoint there"),
        (lambda path: (path / "config.json").unlink(), "no draft checkpoint there"),
        (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda path: (path / "config.json").write_text("[]"), "found:    list"),
        (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json cannot be read"),
        (lambda path: _edit_config(path, architectures=["LlamaModel"]), "no installed algorithm recognises"),
        (lambda path: _edit_config(path, block_size=None), "expected: 'block_size'"),
        (lambda path: _edit_config(path, block_size="four"), "does not describe a DFlash draft"),
        (lambda path: _edit_config(path, block_size=0), "does not describe a DFlash draft"),
        (lambda path: _edit_config(path, target_layer_ids=3), "does not describe a DFlash draft"),
        (lambda path: (path / "model.safetensors").unlink(), "has no weights"),
        (lambda path: (path / "model.safetensors").write_bytes(b"not a checkpoint"), "weights cannot be read"),
        (_truncate, "weights cannot be read"),
        (lambda path: _edit_weights(path, lambda w: w.pop("fc.weight")), "missing: fc.weight"),
        (lambda path: _edit_weights(path, lambda w: w.update(extra=torch.ones(1))), "unexpected: extra"),
        (
            lambda path: _edit_weights(path, lambda w: w.update({"norm.weight": torch.ones(3)})),
            r"of another shape: norm.weight \[3\], expected \[32\]",
        ),
        (lambda path: _edit_config(path, num_hidden_layers=3), "missing: layers.2.input_layernorm.weight"),
    ],
)
def test_damage_is_named(
    checkpoint: Path,
    registry: Registry,
    adapter: Qwen3Adapter,
    damage: Callable[[Path], object],
    expected: str,
) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=expected) as error:
        load_draft(checkpoint, registry=registry, adapter=adapter)
    assert str(checkpoint) in str(error.value), "says where"
