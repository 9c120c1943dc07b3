"""What every exporter keeps, kept by each format: all weights, the layers as its engine counts them, its own folder."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

import deepspec_dflash.plugin
import deepspec_eagle3.plugin
import deepspec_export.plugin
import deepspec_targets.plugin
from deepspec_core.testing import ExporterSuite, broken_by
from deepspec_core.testing.core_registry import core_registry

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
DRAFTS = {
    "dflash": {"block_size": 4, "num_layers": 1, "mask_token_id": 63, "anchor_predicts": False},
    "eagle3": {"ttt_length": 4},
}
# What each engine adds to the number of a tapped layer.
OFFSETS = {
    ("deepspec", "dflash"): 0, ("vllm", "dflash"): 0, ("sglang", "dflash"): 0, ("speculators", "dflash"): 0,
    ("vllm", "eagle3"): 1, ("speculators", "eagle3"): 1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "draft_type"), OFFSETS, ids="-".join)
def test_formats(name: str, draft_type: str) -> None:
    class Export(ExporterSuite):
        component, algorithm, layer_offset = name, draft_type, OFFSETS[name, draft_type]
        draft_options = DRAFTS[draft_type]
        taps = (1, 4, 6)
        plugin = (deepspec_export.plugin, deepspec_dflash.plugin, deepspec_eagle3.plugin)

        def adapter(self) -> Any:
            config = AutoConfig.for_model("llama" if draft_type == "eagle3" else "qwen3", **SIZES)
            return core_registry(deepspec_targets.plugin).load("target", config.model_type)(config)

    assert broken_by(Export) == {}
