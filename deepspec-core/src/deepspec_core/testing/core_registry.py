"""A registry of core's own loss terms and weightings, for tests that must not depend on what is installed."""

from __future__ import annotations

from deepspec_core import plugin
from deepspec_core.plugins.registry import Offer, Registry

__all__ = ["core_registry"]


def core_registry() -> Registry:
    """A registry of the loss terms and weightings that core's plugin offers."""
    offers = [("loss", spec) for spec in plugin.deepspec_losses()]
    offers += [("weighting", spec) for spec in plugin.deepspec_weightings()]
    return Registry(
        [Offer(kind=kind, spec=spec, plugin="core", package="deepspec-core", version="0") for kind, spec in offers]
    )
