"""The loss term that this package offers. Imports core's specs only, and refers to the loss itself by text."""

from collections.abc import Iterable

from deepspec_core.plugins import ComponentSpec, hookimpl


@hookimpl
def deepspec_losses() -> Iterable[ComponentSpec]:
    """One term: `[loss] terms = {hellinger = 1.0}`."""
    yield ComponentSpec(
        name="hellinger",
        summary="Squared Hellinger distance between the draft's and the target's distribution.",
        build="deepspec_hellinger.loss:Hellinger",
    )
