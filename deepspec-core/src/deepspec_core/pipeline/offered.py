"""Checks whether a plugin's feature source or cache format has the members that its contract requires.

Knows the members of these two contracts. Does not know stages, or any source or format.
"""

from __future__ import annotations

from typing import Any

from deepspec_core.contracts.cache import CacheFormat
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.errors import PluginError
from deepspec_core.plugins.registry import Registry

_FEATURES = ("__len__", "lengths", "__getitem__", "features")
_CACHE = ("create", "header", "open", "verify", "bytes_per_token")


def check_source_kind(registry: Registry, mode: str) -> None:
    """Raise PluginError if a feature source cannot be imported or called, or is a class without a member it needs.

    What a function will return is not known before it is called, which takes data: check_source looks at that.
    """
    build = registry.load("features", mode)
    if not callable(build):
        _refuse(registry, "features", mode, found=f"{type(build).__name__}, which cannot be called", expected=_FEATURES)
    if isinstance(build, type) and not hasattr(build, "__getattr__"):
        _require(registry, "features", mode, build, _FEATURES)


def check_source(registry: Registry, mode: str, source: Any) -> FeatureSource:
    """The feature source that was built. Raises PluginError if it lacks a member."""
    _require(registry, "features", mode, source, _FEATURES)
    checked: FeatureSource = source
    return checked


def check_format(registry: Registry, name: str) -> None:
    """Raise PluginError if a cache format cannot be imported or built, or lacks a member."""
    made: CacheFormat = registry.build("cache", name)
    _require(registry, "cache", name, made, _CACHE)


def _require(registry: Registry, kind: str, name: str, offered: Any, members: tuple[str, ...]) -> None:
    missing = [member for member in members if not callable(getattr(offered, member, None))]
    if missing:
        title = offered.__name__ if isinstance(offered, type) else type(offered).__name__
        _refuse(registry, kind, name, found=f"{title} without {', '.join(missing)}", expected=members)


def _refuse(registry: Registry, kind: str, name: str, *, found: str, expected: tuple[str, ...]) -> None:
    title, contract = {
        "features": ("feature source", "contracts.features.FeatureSource"),
        "cache": ("cache format", "contracts.cache.CacheFormat"),
    }[kind]
    raise PluginError(
        f"{name!r} is not a {title}",
        where=registry.provider(kind, name),
        found=found,
        expected=f"an object from `build` with {', '.join(expected)} ({contract})",
    )
