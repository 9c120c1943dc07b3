"""Which installed format a cache on disk has. Asks the formats; knows none of them."""

from __future__ import annotations

from pathlib import Path

from deepspec_core.contracts.cache import CacheFormat
from deepspec_core.errors import CacheError, PluginError
from deepspec_core.plugins.registry import Registry


def format_of(folder: Path, registry: Registry, named: str | None = None) -> tuple[str, CacheFormat]:
    """The name and the format: the one that is `named`, else the one that finds a cache in the folder.

    CacheError where none does. A format's own complaint counts where no other format finds a cache.
    """
    if named is not None:
        return named, registry.cache_format(named)
    complaints: list[CacheError | PluginError] = []
    for name in registry.names("cache"):
        try:
            cache_format: CacheFormat = registry.cache_format(name)
            if cache_format.header(folder) is not None:
                return name, cache_format
        except (CacheError, PluginError) as error:  # a plugin that fails hides no other format's cache
            complaints.append(error)
    if complaints:
        # A format that recognises a damaged cache of its own says more than those that see another format.
        raise next((error for error in complaints if "another format" not in error.problem), complaints[0])
    raise CacheError(
        "There is no cache",
        where=folder,
        expected=f"a folder that the cache stage wrote, in one of the formats {', '.join(registry.names('cache'))}",
        fix="Name the cache's own folder, such as runs/NAME/cache.",
    )
