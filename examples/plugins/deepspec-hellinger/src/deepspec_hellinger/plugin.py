"""What this package offers to DeepSpec. Imports core's specs only; the loss itself is named as text."""

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
