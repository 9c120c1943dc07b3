"""The format of the `speculators` package, which vLLM reads too: the draft's layers stand in a table of their own.

Knows the keys and defaults of speculators 0.9, and how vLLM 0.33 turns such a config into one of its own. Not weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from attrs import evolve

from deepspec_core.contracts.export import ExportFacts
from deepspec_core.errors import ExportError
from deepspec_export import transformer_keys, vllm
from deepspec_export.served import Served

NAME: Final = "speculators"
WRITTEN_FOR: Final = {"speculators": "0.9.0", "vllm": "0.33.0"}
_CLASSES: Final = {"eagle3": "Eagle3Speculator", "dflash": "DFlashSpeculator", "dspark": "DSparkSpeculator"}
_HEAD_KEYS: Final = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")


def unservable(facts: ExportFacts) -> str | None:
    """Why vLLM cannot serve the draft in this format, and the nearest alternative, or None.

    ExportError if the target's name is not known.
    """
    if facts.target is None:
        raise ExportError(
            f"the draft cannot be exported to {NAME}",
            where="the draft's target",
            found="the format names the draft's target, and nothing beside the checkpoint does",
            fix="Name it in --target.",
        )
    return vllm.unservable_in(facts, other_heads="export to sglang, which has all three heads,")


def config(served: Served, facts: ExportFacts) -> dict[str, Any]:
    """The whole config.json. It has no top-level `model_type`, which vLLM would take for the draft's own."""
    native = vllm.config(served, facts)
    assert facts.target is not None
    layers = transformer_keys.written(served, facts)
    keys: dict[str, Any] = {
        "architectures": [_CLASSES[served.method]],
        "speculators_model_type": served.method,
        "speculators_version": WRITTEN_FOR["speculators"],
        "speculators_config": {
            "algorithm": served.method,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": served.proposes}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": facts.target.name, "architectures": []},
        },
        "draft_vocab_size": served.draft_vocab_size,
        "target_hidden_size": served.hidden_size,
        "tie_word_embeddings": False,
        "dtype": layers["dtype"],
    }
    if served.method == "eagle3":
        named = ("eagle_aux_hidden_state_layer_ids", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        # The number of taps is read from the layers' table.
        layers["num_aux_hidden_states"] = native["num_aux_hidden_states"]
        return keys | {name: native[name] for name in named} | {"transformer_layer_config": layers}
    keys |= {
        "aux_hidden_state_layer_ids": [layer + 1 for layer in served.feature_layers],
        "mask_token_id": served.mask_token_id,
        "block_size": native["block_size"],
        "sample_from_anchor": served.anchor_predicts,
        # False would make vLLM's blocks causal in full attention as well.
        "sliding_window_non_causal": not served.block_causal,
    }
    if served.method == "dspark":
        keys |= {name: native[name] for name in _HEAD_KEYS}
    return keys | {"transformer_layer_config": layers}


def read(keys: Mapping[str, Any]) -> Served:
    """What vLLM makes of a config.json, by way of its own format. KeyError where a key that it needs is absent."""
    method = keys["speculators_model_type"]
    native: dict[str, Any] = {**keys["transformer_layer_config"], "draft_vocab_size": keys.get("draft_vocab_size")}
    if method == "eagle3":
        native["architectures"] = [
            {"qwen3": "Eagle3Qwen3ForCausalLM", "llama": "LlamaForCausalLMEagle3"}[native["model_type"]]
        ]
        native["eagle_aux_hidden_state_layer_ids"] = keys["eagle_aux_hidden_state_layer_ids"]
        native["norm_before_residual"] = keys.get("norm_before_residual", True)
        native |= {name: keys.get(name, False) for name in ("norm_before_fc", "fc_norm", "norm_output")}
    elif method == "dflash":
        if keys.get("sample_from_anchor", False):
            raise KeyError("sample_from_anchor")
        native["architectures"] = ["DFlashDraftModel"]
        native["block_size"] = keys["block_size"]
        native["dflash_config"] = {
            "mask_token_id": keys["mask_token_id"],
            "target_layer_ids": [layer - 1 for layer in keys["aux_hidden_state_layer_ids"]],
            "causal": not keys.get("sliding_window_non_causal", True),
        }
    else:
        native["architectures"] = ["Qwen3DSparkModel"]
        native["sample_from_anchor"] = keys.get("sample_from_anchor", False)
        native["target_layer_ids"] = [layer - 1 for layer in keys["aux_hidden_state_layer_ids"]]
        native |= {name: keys[name] for name in ("mask_token_id", "block_size", *_HEAD_KEYS) if name in keys}
    (proposal,) = keys["speculators_config"]["proposal_methods"]
    served = vllm.read(native)
    asked = proposal["speculative_tokens"]
    # vLLM takes this number; where the block has another, it is the block's that disagrees with the draft.
    return evolve(served, proposes=asked) if served.proposes in (None, asked) else served


def notes(served: Served) -> list[str]:
    """What whoever serves the export should know."""
    if served.window is None or served.method == "eagle3":
        return vllm.notes(served)
    return [
        *vllm.notes(served),
        "vLLM counts a window from each slot, as this draft was trained. The speculators package, when it trains, "
        "counts it from the anchor.",
    ]


def command(served: Served, *, target: str, draft: str) -> str:
    """The line that serves the export."""
    return vllm.command(served, target=target, draft=draft)
