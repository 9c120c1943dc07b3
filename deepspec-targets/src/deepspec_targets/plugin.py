"""What this package offers: target families, the built-in tiny target, and the prompts it was trained on.

Imports core's records only; every heavy part is named as text.
"""

from __future__ import annotations

from collections.abc import Iterable

from deepspec_core.hookspecs import hookimpl
from deepspec_core.specs import BuiltinSpec, TargetAdapterSpec


@hookimpl
def deepspec_target_adapters() -> Iterable[TargetAdapterSpec]:
    """The families."""
    return [
        TargetAdapterSpec(
            name="qwen3",
            summary="Qwen3 dense models",
            build="deepspec_targets.qwen3:Qwen3Adapter",
            model_types=("qwen3",),
        )
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
