"""What this package offers: the `eagle3` draft. Imports attrs and core's records only."""

from __future__ import annotations

from collections.abc import Iterable

from deepspec_core.plugins import DraftModelSpec, Recipe, hookimpl
from deepspec_eagle3.options import Eagle3Options, is_eagle3


@hookimpl
def deepspec_draft_models() -> Iterable[DraftModelSpec]:
    """The algorithm."""
    return [
        DraftModelSpec(
            name="eagle3",
            summary="autoregressive drafter: one token a step from its own last output, trained on its own outputs",
            build="deepspec_eagle3.model:Eagle3Model",
            options=Eagle3Options,
            class_suffix="Eagle3Model",
            recognise=is_eagle3,
            options_of="deepspec_eagle3.options:options_of",
            elsewhere={
                "Eagle3Speculator": "speculators' layout, with other names of weights and layers",
                "LlamaForCausalLMEagle3": "SpecForge's and the engines' layout, with other names of weights and layers",
                "Eagle3LlamaForCausalLM": "the engines' layout, with other names of weights and layers",
                "Eagle3Qwen3ForCausalLM": "the engines' layout, with other names of weights and layers",
                "Eagle3DraftModel": "an engine's layout, with other names of weights and layers",
                "speculators_model_type": "a key of speculators' layout, with other names of weights and layers",
            },
            takes_packed=True,
            default_loss={"terms": {"soft_ce": 1.0}},
            recommended=Recipe(
                options={"count": "labels"},
                train={"optimizer": "muon"},
                evidence=(
                    "Measured on the built-in target with a learning rate of 4e-3, in three seeds and at equal "
                    "training compute (643 steps against 667): accepted length 4.26 at temperature 0 and 3.52 at "
                    "temperature 1, against 3.59 and 2.86 as published. Nothing is known of long training or of a "
                    "large target."
                ),
            ),
        )
    ]
