"""z-lab's own layout of DFlash: a Qwen3 config with `dflash_config`, which vLLM, SGLang and llama.cpp's converter read.

Knows the keys and defaults of z-lab's `DFlashDraftModel`, of 2026. Not weights, nor z-lab's second layout (DFlash2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from deepspec_core.contracts.export import ExportFacts
from deepspec_export import layers, sglang, transformer_keys, vllm
from deepspec_export.served import DFLASH, Served

NAME: Final = "z-lab"
WRITTEN_FOR: Final = {"z-lab/dflash": "October 2026"}
ARCHITECTURE: Final = "DFlashDraftModel"
_ENGINE: Final = "z-lab's DFlash"
# What its model does with a key that is absent.
_BLOCK_SIZE: Final = 16
_PLAIN: Final = {"input_embedding_scale": 1.0, "output_multiplier": 1.0}


def unservable(facts: ExportFacts) -> str | None:
    """Why z-lab's layout cannot hold the draft, and the nearest alternative, or None."""
    if reason := layers.block_draft_unlike_engine(facts, engine=_ENGINE):
        return reason
    if facts.description.anchor_predicts:
        return (
            "the anchor's slot of the draft's block predicts, and in z-lab's layout it never does. Export to vllm or "
            "sglang, as DSpark, or train with [draft] anchor_predicts = false."
        )
    return None


def config(served: Served, facts: ExportFacts) -> dict[str, Any]:
    """The whole config.json."""
    assert served.proposes is not None
    keys = transformer_keys.written(served, facts)
    # Its mask asks each layer for its own kind, and is symmetric where nothing is causal, as ours is.
    return keys | {
        "architectures": [ARCHITECTURE],
        "block_size": served.proposes + 1,
        "num_target_layers": facts.config["num_target_layers"],
        "dflash_config": {"target_layer_ids": list(served.feature_layers), "mask_token_id": served.mask_token_id},
    }


def read(keys: Mapping[str, Any]) -> Served:
    """What z-lab's model makes of a config.json. KeyError where a key that it needs is absent, or one is not known."""
    (architecture,) = keys["architectures"]
    inner = keys.get("dflash_config") or {}

    def value(name: str, default: Any = None) -> Any:
        return inner.get(name, keys.get(name, default))

    if architecture != ARCHITECTURE:
        raise KeyError("architectures")
    for name, plain in _PLAIN.items():
        if float(value(name, plain)) != plain:
            raise KeyError(name)
    if value("final_logit_softcapping"):
        raise KeyError("final_logit_softcapping")
    if value("target_layer_ids") is None or value("mask_token_id") is None:
        raise KeyError("dflash_config")
    return Served(
        feature_layers=tuple(value("target_layer_ids")),
        block_causal=transformer_keys.causal(keys),
        proposes=int(value("block_size", _BLOCK_SIZE)) - 1,
        mask_token_id=value("mask_token_id"),
        draft_vocab_size=keys.get("draft_vocab_size") or keys["vocab_size"],
        **transformer_keys.read(keys),
        **DFLASH,
    )


def notes(served: Served) -> list[str]:
    """What whoever serves the export should know."""
    return []


def command(served: Served, *, target: str, draft: str) -> str:
    """The lines that serve the export: both engines read the layout."""
    return f"{vllm.command(served, target=target, draft=draft)}\n{sglang.command(served, target=target, draft=draft)}"
