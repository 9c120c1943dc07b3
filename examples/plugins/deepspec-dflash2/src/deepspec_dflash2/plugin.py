"""The components that the package offers: the draft type, and the loss term that trains its selector."""

from deepspec_core.plugins import ComponentSpec, DraftModelSpec, hookimpl
from deepspec_dflash2.options import DFlash2Options, is_dflash2


@hookimpl
def deepspec_draft_models():
    yield DraftModelSpec(
        name="dflash2",
        summary="DFlash with convolutions inside a block and a walk through the head's candidates",
        build="deepspec_dflash2.draft:DFlash2Draft",
        options=DFlash2Options,
        class_suffix="DFlash2DraftModel",
        recognise=is_dflash2,
        options_of="deepspec_dflash2.options:options_of",
        proposes_trees=True,
        takes_packed=True,
        default_loss={"terms": {"ce": 1.0, "selector": 1.0}, "weighting": {"type": "decay", "gamma": 4.0}},
    )


@hookimpl
def deepspec_losses():
    yield ComponentSpec(
        name="selector",
        summary="cross-entropy of DFlash 2's selector at the label, among the head's candidates",
        build="deepspec_dflash2.loss:SelectorLoss",
    )
