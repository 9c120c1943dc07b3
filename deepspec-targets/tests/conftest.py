"""Tiny random targets of every family, in every shape its layers come in, for the tests of all families alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import frozen
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0,
    "initializer_range": 0.1,
}  # fmt: skip
WINDOW = 4
PATTERN = ["sliding_attention", "sliding_attention", "full_attention"] * 2
GEMMA4 = SIZES | {
    "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "layer_types": PATTERN, "sliding_window": WINDOW, "final_logit_softcapping": 2.0,
}  # fmt: skip
DENSE = {"hidden_size_per_layer_input": 0}
OWN_LAYER = LayerOptions(intermediate_size=40)
LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


@frozen(kw_only=True)
class Family:
    """One shape of one family's targets. `full_layer`: a layer that draft blocks compute too, or None."""

    adapter: str
    config_class: Any
    settings: dict[str, Any]
    full_layer: int | None
    layer: LayerOptions | None = None

    def config(self) -> Any:
        """A fresh transformers config."""
        return self.config_class(**self.settings)

    def model(self) -> Any:
        """A target with random weights in norms, biases and buffers too, so that a forgotten one shows."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config(), attn_implementation="sdpa").float().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                nn.init.uniform_(buffer, 0.5, 1.5)
        return model


FAMILIES = {
    "qwen3": Family(adapter="qwen3", config_class=Qwen3Config, settings=SIZES | {"head_dim": 16}, full_layer=2),
    "qwen3-yarn": Family(
        adapter="qwen3", config_class=Qwen3Config, full_layer=2,
        settings=SIZES | {"head_dim": 16, "rope_parameters": YARN_ROPE},
    ),
    "qwen3-bias-sliding": Family(
        adapter="qwen3", config_class=Qwen3Config, full_layer=1,
        settings=SIZES | {
            "head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
    "qwen2": Family(
        adapter="qwen2", config_class=Qwen2Config, settings=SIZES | {"tie_word_embeddings": True}, full_layer=2
    ),
    "qwen2-sliding": Family(
        adapter="qwen2", config_class=Qwen2Config, full_layer=1,
        settings=SIZES | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "llama": Family(
        adapter="llama", config_class=LlamaConfig, full_layer=2, settings=SIZES | {"rope_parameters": LLAMA_ROPE}
    ),
    "llama-bias": Family(
        adapter="llama", config_class=LlamaConfig, full_layer=2,
        settings=SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama-linear": Family(
        adapter="llama", config_class=LlamaConfig, full_layer=2, settings=SIZES | {"rope_parameters": LINEAR_ROPE}
    ),
    "mistral": Family(
        adapter="mistral", config_class=MistralConfig, settings=SIZES | {"sliding_window": None}, full_layer=2
    ),
    "mistral-sliding": Family(
        adapter="mistral", config_class=MistralConfig, settings=SIZES | {"sliding_window": WINDOW}, full_layer=None
    ),
    "gemma3": Family(
        adapter="gemma3", config_class=Gemma3TextConfig, full_layer=2,
        settings=SIZES | {
            "head_dim": 16, "query_pre_attn_scalar": 24, "layer_types": PATTERN, "sliding_window": WINDOW,
        },
    ),
    "gemma4": Family(adapter="gemma4", config_class=Gemma4TextConfig, settings=GEMMA4 | DENSE, full_layer=2),
    "gemma4-own-values": Family(
        adapter="gemma4", config_class=Gemma4TextConfig, full_layer=2,
        settings=GEMMA4 | DENSE | {"attention_k_eq_v": False, "num_global_key_value_heads": None},
    ),
    "gemma4-unified": Family(
        adapter="gemma4", config_class=Gemma4UnifiedTextConfig, settings=GEMMA4, full_layer=2
    ),
    "gemma4-per-layer-inputs": Family(
        adapter="gemma4", config_class=Gemma4TextConfig, full_layer=None, layer=OWN_LAYER,
        settings=GEMMA4 | {
            "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True, "attention_k_eq_v": False, "num_global_key_value_heads": None,
        },
    ),
    "gemma4-experts": Family(
        adapter="gemma4", config_class=Gemma4TextConfig, full_layer=None, layer=OWN_LAYER,
        settings=GEMMA4 | DENSE | {
            "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
        },
    ),
    "qwen3_moe": Family(
        adapter="qwen3_moe", config_class=Qwen3MoeConfig, full_layer=None, layer=OWN_LAYER,
        settings=SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each shape of each family."""
    return FAMILIES[request.param]


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.full_layer is not None])
def dense_family(request: pytest.FixtureRequest) -> Family:
    """Those with a layer that draft layers are like."""
    return FAMILIES[request.param]


@pytest.fixture
def families() -> dict[str, Family]:
    """All of them, by name."""
    return FAMILIES


@pytest.fixture
def adapter(family: Family, registry: Registry) -> FamilyAdapter:
    """The family's adapter, as the registry finds it by model type."""
    config = family.config()
    spec = registry.adapter_for(config.model_type)
    assert spec.name == family.adapter
    made: FamilyAdapter = registry.load("target", spec.name)(config, family.layer)
    return made
