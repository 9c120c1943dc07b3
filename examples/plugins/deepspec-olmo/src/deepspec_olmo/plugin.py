"""The component that this package offers: one target family."""

from collections.abc import Iterable

from deepspec_core.plugins import TargetAdapterSpec, hookimpl


@hookimpl
def deepspec_target_adapters() -> Iterable[TargetAdapterSpec]:
    """OLMo 2 and 3, which have a config class each."""
    types = ("olmo2", "olmo3")
    yield TargetAdapterSpec(
        name="olmo", summary="OLMo 2 and 3", build="deepspec_olmo.olmo:OlmoAdapter", model_types=types
    )
