"""What this package offers: target families, small language models as drafts, the built-in tiny target, its prompts.

Imports core's records only; every heavy part is named as text.
"""

from __future__ import annotations

from collections.abc import Iterable

from deepspec_core.plugins import BuiltinSpec, DraftModelSpec, TargetAdapterSpec, hookimpl
from deepspec_targets.small_lm.options import SmallLMOptions

# name, summary, module:class in this package, model types
_FAMILIES = (
    (
        "gemma4",
        "Gemma 4, text and the text part of multimodal models",
        "gemma4:Gemma4Adapter",
        "gemma4 gemma4_text gemma4_unified gemma4_unified_text",
    ),
    (
        "gemma3",
        "Gemma 3, text and the text part of multimodal models",
        "gemma3:Gemma3Adapter",
        "gemma3 gemma3_text",
    ),
    ("llama", "Llama and models published as one", "llama:LlamaAdapter", "llama"),
    ("mistral", "Mistral dense models", "llama:MistralAdapter", "mistral"),
    ("qwen2", "Qwen2 and Qwen2.5 dense models", "qwen2:Qwen2Adapter", "qwen2"),
    ("qwen3", "Qwen3 dense models", "qwen3:Qwen3Adapter", "qwen3"),
    ("qwen3_moe", "Qwen3 mixture-of-experts models, with a dense draft", "qwen3_moe:Qwen3MoeAdapter", "qwen3_moe"),
)


@hookimpl
def deepspec_target_adapters() -> Iterable[TargetAdapterSpec]:
    """The families."""
    return [
        TargetAdapterSpec(
            name=name, summary=summary, build=f"deepspec_targets.{build}", model_types=tuple(model_types.split())
        )
        for name, summary, build, model_types in _FAMILIES
    ]


@hookimpl
def deepspec_builtins() -> Iterable[BuiltinSpec]:
    """What ships inside the package."""
    return [
        BuiltinSpec(
            name="tiny-qwen3",
            summary="a small chat model trained on tiny-dialogues, for trying things out on a CPU",
            build="deepspec_targets.builtin:tiny_qwen3",
            kind="model",
        ),
        BuiltinSpec(
            name="tiny-dialogues",
            summary="generated prompts: arithmetic, conversions, tables, JSON, small functions, stories",
            build="deepspec_targets.dialogues:prompts",
            kind="prompts",
        ),
    ]


@hookimpl
def deepspec_draft_models() -> Iterable[DraftModelSpec]:
    """A draft that every family's models can be."""
    return [
        DraftModelSpec(
            name="small-lm",
            summary="Any causal language model with the target's tokenizer, one forward pass a token. Not trained.",
            build="deepspec_targets.small_lm.draft:SmallLM",
            options=SmallLMOptions,
            trained=False,
            also_called=("hf",),
        )
    ]
