"""A draft for longer contexts than its training shows: rotary parameters of its own, trained, decoded and written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft, save_draft
from deepspec_core.cli.main import main
from deepspec_core.errors import TargetError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import open_adapter

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def _angles(adapter: Any) -> torch.Tensor:
    cos, sin = adapter.rotary()(torch.zeros(1, 1, 1), torch.arange(64)[None])
    return torch.stack([cos, sin])


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "gemma4"])
def test_it_is_the_drafts_alone_and_survives_a_checkpoint(
    tmp_path: Path, registry: Registry, tiny_target: Any, family: str
) -> None:
    target = tiny_target(family)
    plain = open_adapter(target.where, registry=registry)
    try:
        own = open_adapter(target.where, registry=registry, draft_layer=LayerOptions(rope=YARN))
    except TargetError as error:
        # Older releases of transformers form Gemma 4's angles for the heads of its sliding layers only.
        if family == "gemma4" and "angles of another size" in str(error):
            return
        raise
    assert own.architecture == plain.architecture, "the target keeps its own"
    assert not torch.allclose(_angles(own), _angles(plain))
    options = registry.get("draft", "dflash").options(num_layers=1, mask_token_id=39)
    draft = registry.load("draft", "dflash")(options, own, (1, 3))
    save_draft(draft, own, tmp_path / "draft")
    entry = json.loads((tmp_path / "draft" / "config.json").read_text())["rope_parameters"]
    assert YARN.items() <= (entry.get("full_attention") or entry).items()
    adapter = draft_adapter(tmp_path / "draft", registry=registry)
    torch.testing.assert_close(_angles(adapter), _angles(own), rtol=0, atol=0)
    loaded = load_draft(tmp_path / "draft", registry=registry, adapter=adapter)
    assert all(torch.equal(one, other) for one, other in zip(loaded.buffers(), draft.buffers(), strict=True))


def test_the_base_alone_may_change(registry: Registry, tiny_target: Any) -> None:
    target = tiny_target("qwen3")
    own = open_adapter(target.where, registry=registry, draft_layer=LayerOptions(rope={"rope_theta": 12345.0}))
    assert own.draft_config(1, {}).rope_parameters["rope_theta"] == 12345.0
    assert own.draft_config(1, {}).rope_parameters["rope_type"] == "default"


@pytest.mark.slow
def test_a_run_trains_decodes_and_writes_it(finished_copy: Path) -> None:
    """From the answers and the cache of a run without it."""
    rope = 'draft.layer.rope={rope_type="yarn",factor=2.0,original_max_position_embeddings=512}'
    command = ["run", str(finished_copy), "--smoke", "--set", "run.threads=1", "--set", "evaluate.temperature=[0.0]"]
    assert main([*command, "--force", "train", "--set", rope]) == 0
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    assert json.loads((folder / "draft" / "config.json").read_text())["rope_parameters"]["rope_type"] == "yarn"
    assert all(not one["mismatches"] for one in json.loads((folder / "metrics.json").read_text())["results"])


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ('{rope_type="dynamic", factor=2.0}', "rope_type"),
        ('{rope_type="yarn", factor=2.0}', "original_max_position_embeddings"),
        ("{factor=0}", "above 0"),
        ("{theta=1e4}", "theta"),
        ('{rope_theta="big"}', "above 0"),
        ('{rope_type="default", factor=4.0}', "default does not read"),
        ('{rope_type="linear", factor=4.0, beta_fast=16.0}', "beta_fast"),
        ('{rope_type="yarn", factor=0.5, original_max_position_embeddings=1024}', ">= 1"),
        ('{rope_type="yarn", factor=4.0, original_max_position_embeddings=1024.5}', "a whole number"),
        ('{rope_type="yarn", factor=4.0, original_max_position_embeddings=0.5}', "a whole number"),
        ('{rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_slow=40.0}', "below beta_fast"),
        (
            '{rope_type="llama3", factor=4, original_max_position_embeddings=9, low_freq_factor=4, high_freq_factor=4}',
            "below high_freq_factor",
        ),
        ("{rope_theta=1.0}", "above 1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run_file: Path, capsys: pytest.CaptureFixture[str], rope: str, says: str
) -> None:
    assert main(["config", "check", str(run_file), "--set", f"draft.layer.rope={rope}"]) == 2
    seen = capsys.readouterr().err
    assert "draft.layer.rope" in seen
    assert says in seen


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("rope", [{"factor": 4.0}, {"beta_fast": 16.0}, {"original_max_position_embeddings": 64}])
def test_what_the_targets_kind_does_not_read_is_refused(
    registry: Registry, tiny_target: Any, family: str, rope: dict[str, Any]
) -> None:
    """It would change no angle, and stand in every config.json."""
    with pytest.raises(TargetError, match="rope_type default does not read"):
        open_adapter(tiny_target(family).where, registry=registry, draft_layer=LayerOptions(rope=rope))


def _with_rope(target: Any, folder: Path, **entry: Any) -> Path:
    config = json.loads((target.where / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 1e4, **entry}}))
    return folder


def test_one_parameter_of_a_yarn_target_may_change(registry: Registry, tiny_target: Any, tmp_path: Path) -> None:
    folder = _with_rope(tiny_target("qwen3"), tmp_path, **YARN)
    own = open_adapter(folder, registry=registry, draft_layer=LayerOptions(rope={"factor": 8.0}))
    assert not torch.allclose(_angles(own), _angles(open_adapter(folder, registry=registry)))
    with pytest.raises(TargetError, match="below beta_fast"):
        open_adapter(folder, registry=registry, draft_layer=LayerOptions(rope={"beta_fast": 0.5}))


@pytest.mark.parametrize("change", [{"factor": "4.0"}, {"factor": -4.0}, {"factor": 1e300}, {"factor": 0.5}])
def test_a_target_whose_factor_makes_no_sense(
    registry: Registry, tiny_target: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(TargetError, match="the factor of the rotary embedding is"):
        open_adapter(_with_rope(tiny_target("qwen3"), tmp_path, **{**YARN, **change}), registry=registry)


@pytest.mark.parametrize(
    ("entry", "positions"),
    [
        (YARN, 128),
        # transformers takes max_position_embeddings, 128, for what the factor multiplies.
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        # Gemma 3's config names the scaled number with this kind.
        ({"rope_type": "linear", "factor": 4.0}, 128),
    ],
)
def test_the_positions_of_a_stretched_target(
    registry: Registry, tiny_target: Any, tmp_path: Path, entry: dict[str, Any], positions: int
) -> None:
    folder = _with_rope(tiny_target("qwen3"), tmp_path, **entry)
    assert open_adapter(folder, registry=registry).architecture.max_positions == positions
