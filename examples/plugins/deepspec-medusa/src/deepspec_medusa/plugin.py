"""The component that the package offers: one draft type."""

from deepspec_core.plugins import DraftModelSpec, hookimpl
from deepspec_medusa.options import MedusaOptions, is_medusa


@hookimpl
def deepspec_draft_models():
    yield DraftModelSpec(
        name="medusa",
        summary="Medusa-1: a head for each of the next tokens, on the target's last hidden state",
        build="deepspec_medusa.draft:MedusaDraft",
        options=MedusaOptions,
        class_suffix="MedusaModel",
        recognise=is_medusa,
        options_of="deepspec_medusa.options:options_of",
        proposes_trees=True,
        takes_packed=True,
        needs_taps=False,
        # The paper weighs head k by 0.8 ** k, and 0.8 is exp(-1 / 4.4814).
        default_loss={"terms": {"ce": 1.0}, "weighting": {"type": "decay", "gamma": 4.4814}},
    )
