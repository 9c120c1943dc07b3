"""A registry of core's own loss terms and weightings, for tests that must not depend on what is installed."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from deepspec_core import plugin
from deepspec_core.plugins.registry import KINDS, Offer, Registry
from deepspec_core.plugins.specs import ComponentSpec

__all__ = ["core_registry"]


def core_registry(*plugins: ModuleType) -> Registry:
    """A registry of the loss terms and weightings that core's plugin offers, and of all that these modules offer.

    `plugins` are modules as an entry point names them, such as a package's plugin.py. They need not be installed.
    """
    offers = [_offer(kind, spec, "deepspec-core") for kind in ("loss", "weighting") for spec in _specs(plugin, kind)]
    offers += [
        _offer(kind, spec, module.__name__) for module in plugins for kind in KINDS for spec in _specs(module, kind)
    ]
    return Registry(offers)


def _specs(module: ModuleType, kind: str) -> Iterable[ComponentSpec]:
    offered: Iterable[ComponentSpec] = getattr(module, KINDS[kind].hook, tuple)()
    return offered


def _offer(kind: str, spec: ComponentSpec, package: str) -> Offer:
    return Offer(kind=kind, spec=spec, plugin=package, package=package, version="0")
