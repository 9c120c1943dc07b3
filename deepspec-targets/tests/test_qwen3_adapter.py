"""The qwen3 adapter: the draft's shape, published names and config, beside what all families are tested for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen3Config

from deepspec_core.contracts.target import SpecialTokens, TargetAdapter
from deepspec_core.layers.options import LayerOptions
from deepspec_targets.qwen3 import Qwen3Adapter

PARITY = Path(__file__).parents[2] / "tests" / "parity"


@pytest.fixture
def adapter() -> Qwen3Adapter:
    return Qwen3Adapter(AutoConfig.from_pretrained(PARITY / "qwen3-target"))


def test_it_is_a_target_adapter_with_the_targets_numbers(adapter: Qwen3Adapter) -> None:
    assert isinstance(adapter, TargetAdapter)
    architecture = adapter.architecture
    assert (architecture.model_type, architecture.hidden_size, architecture.vocab_size) == ("qwen3", 32, 64)
    assert (architecture.num_layers, architecture.max_positions, architecture.initializer_range) == (8, 512, 0.02)
    assert (architecture.stop_token_ids, architecture.pad_token_id, architecture.mask_token_id) == ((1,), 0, None)
    assert architecture.logit_softcap is None
    assert adapter.unsupported() is None


def test_special_tokens_given_win_over_the_configs() -> None:
    config = AutoConfig.from_pretrained(PARITY / "qwen3-target")
    architecture = Qwen3Adapter(config, None, SpecialTokens(stop=(5, 6), pad=7, mask=8)).architecture
    assert (architecture.stop_token_ids, architecture.pad_token_id, architecture.mask_token_id) == ((5, 6), 7, 8)


def test_the_drafts_own_shape_overrides_sizes() -> None:
    config = AutoConfig.from_pretrained(PARITY / "qwen3-target")
    options = LayerOptions(intermediate_size=96, num_heads=6, num_kv_heads=3, head_dim=16)
    adapter = Qwen3Adapter(config, options)
    projections = adapter.attention_projections(64)
    shapes = [tuple(getattr(projections, slot).weight.shape) for slot in ("query", "key", "value", "out", "query_norm")]
    assert shapes == [(96, 64), (48, 64), (48, 64), (32, 96), (16,)]
    assert projections.scale == 0.25
    assert {tuple(p.shape) for p in adapter.mlp().parameters()} == {(96, 32), (32, 96)}
    assert adapter.rotary()(torch.zeros(1), torch.arange(5)[None])[0].shape == (1, 5, 16)
    written = adapter.draft_config(1, {}).to_dict()
    keys = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    assert [written[key] for key in keys] == [96, 6, 3, 16, 32]
    assert config.num_attention_heads == 4  # the target's own config stays


def test_heads_that_cannot_share_are_unsupported() -> None:
    config = AutoConfig.from_pretrained(PARITY / "qwen3-target")
    reason = Qwen3Adapter(config, LayerOptions(num_heads=3)).unsupported()
    assert reason is not None
    assert "3 attention heads" in reason


def test_a_target_with_layers_no_mask_describes_is_unsupported() -> None:
    config = AutoConfig.from_pretrained(PARITY / "qwen3-target")
    config.layer_types = ["chunked_attention", *["full_attention"] * 7]
    reason = Qwen3Adapter(config).unsupported()
    assert reason is not None
    assert "chunked_attention" in reason


def test_new_weights_start_as_published(adapter: Qwen3Adapter) -> None:
    torch.manual_seed(0)
    embedding = adapter.embedding()
    parameters = [embedding.weight, *adapter.mlp().parameters(), adapter.attention_projections(64).query.weight]
    for weight in (parameter.detach() for parameter in parameters):
        assert abs(float(weight.std()) - 0.02) < 0.002
        assert abs(float(weight.mean())) < 0.002
    assert torch.equal(adapter.norm().weight, torch.ones(32))
    assert torch.equal(adapter.norm(7).weight, torch.ones(7))
    unscaled = adapter.norm(32, scale=False)
    assert not list(unscaled.parameters())
    x = torch.randn(4, 32)
    torch.testing.assert_close(unscaled(x), adapter.norm()(x))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_draft_config_reproduces_the_published_one(adapter: Qwen3Adapter, tmp_path: Path) -> None:
    published = read(PARITY / "qwen3-dflash" / "draft" / "config.json")
    extra = {key: value for key, value in published.items() if key not in read(PARITY / "qwen3-target" / "config.json")}
    assert "target_layer_ids" in extra
    adapter.draft_config(2, extra).save_pretrained(tmp_path)
    written = read(tmp_path / "config.json")
    for by_caller in ("architectures", "transformers_version"):
        written.pop(by_caller, None)
        published.pop(by_caller)
    assert written == published


def test_draft_of_a_tied_quantised_sliding_target_is_untied_plain_and_full() -> None:
    config = Qwen3Config(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2, tie_word_embeddings=True
    )
    config.quantization_config = {"quant_method": "fp8"}
    draft = Qwen3Adapter(config).draft_config(2, {"block_size": 7})
    assert (draft.layer_types, draft.tie_word_embeddings, draft.block_size) == (["full_attention"] * 2, False, 7)
    assert "quantization_config" not in draft.to_dict()


def test_conversation_format_is_chatml(adapter: Qwen3Adapter) -> None:
    format = adapter.conversation_format()
    assert format.assistant_start == "<|im_start|>assistant\n"
    assert format.assistant_ends == ("<|im_end|>",)
    sampling = format.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.8, 20, 0.0)
