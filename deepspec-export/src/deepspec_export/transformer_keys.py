"""The part of an export's config.json that describes a draft's layers: the keys of transformers' own configs.

All formats share it, at the top level or in a table of its own. Knows these keys in both directions; not what an engine
adds to them. What a reader does with absent keys is what engines do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from deepspec_core.checkpoints.draft_window import SLIDING
from deepspec_core.contracts.export import ExportFacts
from deepspec_export.served import Served

QWEN3: Final = "qwen3"
LLAMA: Final = "llama"
FULL: Final = "full_attention"
_DEFAULT_THETA: Final = 1_000_000.0
"""The base of the rotary embedding that engines assume where an export says none."""


def written(served: Served, facts: ExportFacts) -> dict[str, Any]:
    """The keys, every number written out: a default is another one in another version."""
    sliding = served.window is not None
    keys: dict[str, Any] = {
        "model_type": QWEN3 if served.head_norms else LLAMA,
        "hidden_size": served.hidden_size,
        "intermediate_size": served.intermediate_size,
        "num_hidden_layers": served.num_layers,
        "num_attention_heads": served.num_heads,
        "num_key_value_heads": served.num_kv_heads,
        "head_dim": served.head_dim,
        "vocab_size": served.vocab_size,
        "rms_norm_eps": served.norm_eps,
        "hidden_act": served.activation,
        "attention_bias": served.attention_bias,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": facts.config["max_position_embeddings"],
        "initializer_range": facts.config["initializer_range"],
        "rope_parameters": dict(served.rope),
        "rope_theta": served.rope["rope_theta"],
        "layer_types": [SLIDING if sliding else FULL] * served.num_layers,
        "sliding_window": served.window,
        "use_sliding_window": sliding,
        "tie_word_embeddings": False,
        "dtype": facts.config["dtype"],
    }
    if served.block_causal is not None:
        keys["is_causal"] = served.block_causal
    return keys | {name: facts.config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def read(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Served that these keys alone decide. KeyError where one that engines need is absent."""
    rope = dict(keys["rope_parameters"])
    rope.setdefault("rope_theta", keys.get("rope_theta", _DEFAULT_THETA))
    sliding = set(keys.get("layer_types") or [FULL]) == {SLIDING}
    if sliding and keys.get("sliding_window") is None:
        raise KeyError("sliding_window")
    return {
        "num_layers": keys["num_hidden_layers"],
        "hidden_size": keys["hidden_size"],
        "intermediate_size": keys["intermediate_size"],
        "num_heads": keys["num_attention_heads"],
        "num_kv_heads": keys["num_key_value_heads"],
        "head_dim": keys["head_dim"],
        "vocab_size": keys["vocab_size"],
        "norm_eps": keys["rms_norm_eps"],
        "activation": keys["hidden_act"],
        "attention_bias": bool(keys.get("attention_bias", False)),
        "rope": rope,
        "window": keys["sliding_window"] if sliding else None,
    }


def causal(keys: Mapping[str, Any]) -> bool:
    """Whether slots see only earlier slots of their block. Engines take sliding layers for causal if nothing says."""
    stated = keys.get("is_causal")
    if stated is None:
        stated = (keys.get("dflash_config") or {}).get("causal")
    return bool(stated) if stated is not None else SLIDING in (keys.get("layer_types") or [])
