"""What every exporter keeps, kept by each format: all weights, the layers as its engine counts them, its own folder."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

import deepspec_dflash.plugin
import deepspec_dspark.plugin
import deepspec_eagle3.plugin
import deepspec_export.plugin
import deepspec_targets.plugin
from deepspec_core.testing import ExporterSuite, broken_by
from deepspec_core.testing.core_registry import core_registry
from deepspec_dspark.options import MarkovOptions

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
BLOCKS = {"block_size": 4, "num_layers": 1, "mask_token_id": 63}
DRAFTS = {
    "dflash": BLOCKS | {"anchor_predicts": False},
    "dspark": BLOCKS | {"markov": MarkovOptions(rank=6)},
    "eagle3": {"ttt_length": 4},
}
# What each format adds to the number of a tapped layer. SGLang adds 1 of an Eagle3 draft itself.
OFFSETS = {
    ("deepspec", "dflash"): 0, ("vllm", "dflash"): 0, ("sglang", "dflash"): 0, ("speculators", "dflash"): 0,
    ("deepspec", "dspark"): 0, ("vllm", "dspark"): 0, ("sglang", "dspark"): 0, ("speculators", "dspark"): 0,
    ("z-lab", "dflash"): 0,
    ("deepspec", "eagle3"): 0, ("vllm", "eagle3"): 1, ("sglang", "eagle3"): 0, ("speculators", "eagle3"): 1,
}  # fmt: skip
# Each format once, and each algorithm. The other pairs are slow tests.
FIRST = {("deepspec", "dspark"), ("vllm", "dflash"), ("sglang", "eagle3"), ("speculators", "dflash")}
PAIRS = [pytest.param(*pair, id="-".join(pair), marks=() if pair in FIRST else pytest.mark.slow) for pair in OFFSETS]


def test_every_pair_is_here() -> None:
    # A GGUF is one file, which holds a tokenizer that the suite's target does not have: test_gguf.py.
    specs = deepspec_export.plugin.deepspec_exporters()
    offered = {(spec.name, spec.algorithm) for spec in specs if spec.name != "gguf"}
    assert offered == OFFSETS.keys()


@pytest.mark.parametrize(("name", "draft_type"), PAIRS)
def test_formats(name: str, draft_type: str) -> None:
    class Export(ExporterSuite):
        component, algorithm, layer_offset = name, draft_type, OFFSETS[name, draft_type]
        draft_options = DRAFTS[draft_type]
        taps = (1, 4, 6)
        plugin = (deepspec_export.plugin, deepspec_dflash.plugin, deepspec_dspark.plugin, deepspec_eagle3.plugin)

        def adapter(self) -> Any:
            config = AutoConfig.for_model("llama" if draft_type == "eagle3" else "qwen3", **SIZES)
            return core_registry(deepspec_targets.plugin).load("target", config.model_type)(config)

    assert broken_by(Export) == {}
