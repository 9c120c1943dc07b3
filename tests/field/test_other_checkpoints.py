"""A checkpoint of another project is named for what it is, and never read as one of ours."""

import json
from pathlib import Path

import pytest

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
