"""vLLM's own format: a transformers config whose `architectures` names one of vLLM's draft classes.

Knows the keys and defaults of vLLM 0.33 (and 0.32, which is the same here). Not weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from deepspec_core.contracts.export import ExportFacts
from deepspec_export import layers, transformer_keys
from deepspec_export.served import BLOCK, DFLASH, Served

NAME: Final = "vllm"
WRITTEN_FOR: Final = {"vllm": "0.33.0"}
_ENGINE: Final = "vLLM"
# By the source of vLLM 0.32.
_WITHOUT_TAPS: Final = {"gemma3": layers.NO_ENGINE, "gemma3_text": layers.NO_ENGINE}
_DFLASH, _DSPARK, _LLAMA_EAGLE3, _QWEN3_EAGLE3 = (
    "DFlashDraftModel",
    "Qwen3DSparkModel",
    "LlamaForCausalLMEagle3",
    "Eagle3Qwen3ForCausalLM",
)


def unservable(facts: ExportFacts) -> str | None:
    """Why vLLM cannot serve the draft, and the nearest alternative, or None."""
    return unservable_in(facts, other_heads="export to sglang, which has all three heads,")


def unservable_in(facts: ExportFacts, *, other_heads: str) -> str | None:
    """The same for every format that vLLM reads. `other_heads`: what to do with another Markov head than vanilla."""
    if reason := layers.unread_target(facts, engine=_ENGINE, without=_WITHOUT_TAPS):
        return reason
    if facts.description.algorithm == "eagle3":
        return layers.unlike_any_engine(facts, engine=_ENGINE)
    if reason := layers.block_draft_unlike_engine(facts, engine=_ENGINE):
        return reason
    head = facts.config.get("markov_head_type", "vanilla")
    if facts.config.get("markov_rank") and head != "vanilla":
        return (
            f"vLLM has the vanilla Markov head only, and would serve the {head} one as that; {other_heads} or train "
            'with [draft] markov.head = "vanilla".'
        )
    return None


def config(served: Served, facts: ExportFacts) -> dict[str, Any]:
    """The whole config.json."""
    keys = transformer_keys.written(served, facts)
    keys["draft_vocab_size"] = served.draft_vocab_size
    if served.method == "eagle3":
        return keys | {
            "architectures": [_QWEN3_EAGLE3 if served.head_norms else _LLAMA_EAGLE3],
            "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in served.feature_layers],
            # Without it the Llama class takes three, whatever the list above says.
            "num_aux_hidden_states": len(served.feature_layers),
            "target_hidden_size": served.hidden_size,
            "norm_before_residual": served.norm_before_residual,
            "norm_before_fc": served.norm_before_fc,
            "fc_norm": False,
            "norm_output": served.norm_output,
        }
    assert served.proposes is not None
    keys["block_size"] = served.proposes if served.anchor_predicts else served.proposes + 1
    layer_ids = {"target_layer_ids": list(served.feature_layers), "mask_token_id": served.mask_token_id}
    if served.method == "dflash":
        return keys | {"architectures": [_DFLASH], "dflash_config": layer_ids | {"causal": served.block_causal}}
    return (
        keys
        | layer_ids
        | {
            "architectures": [_DSPARK],
            "sample_from_anchor": served.anchor_predicts,
            "markov_rank": served.markov_rank,
            "markov_head_type": served.markov_head,
            "enable_confidence_head": served.confidence,
            "confidence_head_with_markov": served.confidence_with_markov,
        }
    )


def read(keys: Mapping[str, Any]) -> Served:
    """What vLLM makes of a config.json. KeyError where a key that it needs is absent."""
    (architecture,) = keys["architectures"]
    shape = transformer_keys.read(keys)
    draft_vocab_size = keys.get("draft_vocab_size") or keys["vocab_size"]
    if architecture in (_LLAMA_EAGLE3, _QWEN3_EAGLE3):
        ids = keys["eagle_aux_hidden_state_layer_ids"]
        listed = len(ids) if architecture == _QWEN3_EAGLE3 else 3
        if keys.get("num_aux_hidden_states", listed) != len(ids) or keys.get("fc_norm", False):
            raise KeyError("num_aux_hidden_states")
        return Served(
            method="eagle3",
            # The engine's ids count the embedding's output as 0.
            feature_layers=tuple(sorted({layer - 1 for layer in ids})),
            anchor_predicts=None,
            block_causal=None,
            proposes=None,
            mask_token_id=None,
            head_norms=architecture == _QWEN3_EAGLE3,
            norm_before_residual=bool(keys.get("norm_before_residual", False)),
            norm_before_fc=bool(keys.get("norm_before_fc", False)),
            norm_output=bool(keys.get("norm_output", False)),
            markov_rank=0,
            markov_head=None,
            confidence=False,
            confidence_with_markov=False,
            draft_vocab_size=draft_vocab_size,
            **shape,
        )
    dspark = architecture == _DSPARK
    inner = keys if dspark else keys["dflash_config"]
    anchor_predicts = dspark and bool(keys.get("sample_from_anchor", True))
    shape |= {
        "feature_layers": tuple(sorted(set(inner["target_layer_ids"]))),
        "block_causal": transformer_keys.causal(keys),
        # Where the command line does not say: the block, whose first slot is the anchor if it predicts nothing.
        "proposes": keys["block_size"] - (0 if anchor_predicts else 1),
        "mask_token_id": inner["mask_token_id"],
        "draft_vocab_size": draft_vocab_size,
    }
    if not dspark:
        return Served(**shape, **DFLASH)
    confidence = bool(keys.get("enable_confidence_head", False))
    return Served(
        method="dspark",
        anchor_predicts=anchor_predicts,
        markov_rank=keys["markov_rank"],
        markov_head="vanilla",
        confidence=confidence,
        confidence_with_markov=confidence and bool(keys.get("confidence_head_with_markov", False)),
        **shape,
        **BLOCK,
    )


def notes(served: Served) -> list[str]:
    """What whoever serves the export should know."""
    if served.method != "dspark":
        return []
    return ["vLLM serves the method dspark with its model runner V2, which needs a GPU."]


def command(served: Served, *, target: str, draft: str) -> str:
    """The line that serves the export."""
    speculative = f'{{"method": "{served.method}", "model": "{draft}", "num_speculative_tokens": {served.proposes}}}'
    return f"vllm serve {target} --speculative-config '{speculative}'"
