"""What an engine cannot serve is refused, with the reason and what to do instead."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from deepspec_core.errors import ExportError

RANK = {"markov": {"rank": 6}}
STYLE = '[draft.layer] style = "qwen3"'
ENGINES = ("vllm", "sglang", "speculators")
REFUSALS = [
    (ENGINES[::2], "dflash", "qwen2", {}, ("biases (self_attn.k_proj.bias", STYLE)),
    (("sglang",), "dflash", "qwen2", {"layer": {"style": "qwen3"}}, ("qwen2 targets", "an Eagle3", "export to vllm")),
    (("sglang",), "dspark", "gemma3", {**RANK, "layer": {"style": "qwen3"}}, ("gemma3_text targets", "an Eagle3")),
    (ENGINES, "eagle3", "qwen2", {}, ("biases", STYLE)),
    (ENGINES, "dflash", "llama", {}, ("norms of queries and keys", STYLE, "an Eagle3 draft")),
    (ENGINES, "dspark", "mistral", RANK, ("norms of queries and keys", STYLE)),
    (
        ("vllm", "speculators"),
        "dflash",
        "gemma3",
        {"layer": {"style": "qwen3"}},
        ("gemma3_text targets", "needs no export"),
    ),
    (("sglang",), "eagle3", "gemma3", {}, ("pre_feedforward_layernorm.weight", STYLE)),
    (("sglang",), "dflash", "gemma3", {}, ("gemma3_text targets", "an Eagle3")),
    (("gguf",), "dspark", "qwen2", {**RANK, "layer": {"style": "qwen3"}}, ("qwen2 targets", "Export to vllm")),
    (("gguf",), "eagle3", "qwen2", {"num_layers": 1, "layer": {"style": "llama"}}, ("qwen2 targets", "Export to vllm")),
    (("gguf",), "dflash", "gemma3", {"layer": {"style": "qwen3"}}, ("gemma3_text targets", "needs no export")),
    (ENGINES, "dflash", "qwen3", {"taps": (-1, 2)}, ("the target's embedding (layer -1)", "target.layers from 0")),
    (ENGINES[::2], "dspark", "qwen3", {"markov": {"rank": 6, "head": "rnn"}}, ("vanilla", "export to sglang")),
    (ENGINES, "dspark", "qwen3", {**RANK, "vocab_size": 20}, ("reduced vocabulary", "without [draft] vocab_size")),
    (("sglang",), "dspark", "qwen3", {**RANK, "taps": (1, 7)}, ("last layer, 7", "target.layers up to 6", "vllm")),
    (("sglang",), "eagle3", "qwen3", {}, ("norms of queries and keys", "qk_norm = false", "export to vllm")),
    (("sglang",), "eagle3", "llama", {"num_layers": 2}, ("2 layers", "num_layers = 1", "export to vllm")),
    (("sglang",), "eagle3", "llama", {"num_layers": 1, "layer": {"window": 8}}, ("command line", "export to vllm")),
    (
        ("sglang",),
        "dspark",
        "gemma4",
        {**RANK, "layer": {"style": "qwen3"}},
        ("scales its embedding", "vllm"),
    ),
    (("speculators",), "eagle3", "qwen3", {"target": None}, ("names the draft's target", "--target")),
]


@pytest.mark.parametrize(("formats", "algorithm", "family", "options", "says"), REFUSALS)
def test_refused_with_a_way_out(
    drafted: Callable[..., Any],
    tmp_path: Path,
    formats: tuple[str, ...],
    algorithm: str,
    family: str,
    options: dict[str, Any],
    says: tuple[str, ...],
) -> None:
    made = drafted(algorithm, family, **options)
    for name in formats:
        with pytest.raises(ExportError) as refused:
            made.export(name, tmp_path)
        assert [part for part in says if part not in str(refused.value)] == []
    assert list(tmp_path.iterdir()) == []


def test_a_soft_capped_family_is_refused(drafted: Callable[..., Any]) -> None:
    made = drafted("dflash", "gemma4")
    assert "soft-cap" in (evolve(made, facts=evolve(made.facts, softcap=30.0)).unservable("vllm") or "")
