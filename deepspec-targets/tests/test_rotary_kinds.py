"""Rotary embeddings whose angles follow from the sequence's length are refused, in every spelling, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.errors import CheckpointError, TargetError
from deepspec_core.families.rotary_kinds import FIXED, positions, varying_rotary
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import open_adapter

DYNAMIC = {"rope_theta": 1e4, "factor": 4.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16, "rope_theta": 1e4}


def _write(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(("kind", "more"), [("dynamic", DYNAMIC), ("longrope", LONG)])
def test_a_target_whose_angles_vary_is_refused(
    family: Any, kind: str, more: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    fields = family.config().to_dict()
    entry = {"rope_type": kind, **more}
    given = fields["rope_parameters"]
    by_layer_type = any(isinstance(inner, dict) for inner in given.values())
    fields["rope_parameters"] = {**given, "full_attention": entry} if by_layer_type else entry
    with pytest.raises(TargetError) as caught:
        open_adapter(_write(tmp_path, fields), registry=registry, draft_layer=family.layer)
    # Newer releases of transformers do not read longrope for Gemma 4 at all.
    by_library = "not a valid configuration" in str(caught.value)
    assert not by_library or (family.adapter == "gemma4" and kind == "longrope")
    assert by_library or f"rotary embedding is of kind {kind!r}" in str(caught.value)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_the_older_spelling_is_refused_too(key: str, registry: Registry, tmp_path: Path) -> None:
    fields = Qwen3Config(num_hidden_layers=2, eos_token_id=1).to_dict()
    del fields["rope_parameters"]
    fields |= {"rope_scaling": {key: "dynamic", "factor": 2.0}, "rope_theta": 1e4}
    with pytest.raises(TargetError, match="'dynamic'"):
        open_adapter(_write(tmp_path, fields), registry=registry)


def test_a_draft_whose_angles_vary_is_refused(registry: Registry, tmp_path: Path) -> None:
    fields = Qwen3Config(num_hidden_layers=2, rope_parameters={"rope_type": "dynamic", **DYNAMIC}).to_dict()
    with pytest.raises(CheckpointError, match="'dynamic'"):
        draft_adapter(_write(tmp_path, {**fields, "num_target_layers": 4}), registry=registry)


def test_every_kind_that_transformers_knows_is_judged() -> None:
    assert set(ROPE_INIT_FUNCTIONS) - FIXED == {"dynamic", "longrope"}


def test_an_unknown_kind_is_refused() -> None:
    entries = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "spiral"}}
    assert "'spiral'" in str(varying_rotary(SimpleNamespace(rope_parameters=entries)))
    entries["full_attention"]["rope_type"] = "yarn"
    assert varying_rotary(SimpleNamespace(rope_parameters=entries)) is None


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20}, 100),
        ({"full_attention": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 100}}, 200),
    ],
)
def test_positions_are_those_after_stretching(rope: dict[str, Any], expected: int) -> None:
    assert positions(SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)) == expected
