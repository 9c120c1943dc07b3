"""What this package offers: the `dflash` draft. Imports attrs and core's records only."""

from __future__ import annotations

from collections.abc import Iterable

from deepspec_core.plugins import DraftModelSpec, Recipe, hookimpl
from deepspec_dflash.options import DFlashOptions, is_dflash


@hookimpl
def deepspec_draft_models() -> Iterable[DraftModelSpec]:
    """The algorithm."""
    return [
        DraftModelSpec(
            name="dflash",
            summary="block-parallel drafter: every token of a block in one pass, target features as keys and values",
            build="deepspec_dflash.model:DFlashModel",
            options=DFlashOptions,
            class_suffix="DSparkModel",
            recognise=is_dflash,
            proposes_trees=True,
            takes_packed=True,
            options_of="deepspec_dflash.options:options_of",
            elsewhere={
                "DFlashDraftModel": "z-lab's layout; a block's first slot is the anchor and predicts nothing",
                "DFlash2DraftModel": "z-lab's second layout; a block's first slot is the anchor and predicts nothing",
                "DFlashSpeculator": "speculators' layout; a block's first slot is the anchor and predicts nothing",
                "speculators_model_type": "a key of speculators' layout, with other names of weights and layers",
            },
            default_loss={"terms": {"ce": 1.0}, "weighting": {"type": "decay", "gamma": 4.0}},
            recommended=Recipe(
                train={"optimizer": "muon"},
                evidence=(
                    "Measured on the built-in target with a learning rate of 4e-3, in three seeds and at equal "
                    "training compute (850 steps against 975): accepted length 4.20 at temperature 0 and 3.79 at "
                    "temperature 1, against 2.85 and 2.30 as published. Nothing is known of long training or of a "
                    "large target."
                ),
            ),
        )
    ]
