"""Telling plugins that something in a run is over. A plugin that fails on it is reported, and the run goes on.

Knows pluggy's callers. Does not know notices or runs.
"""

from __future__ import annotations

import logging
from typing import Any

import pluggy

from deepspec_core.plugins.references import FAILURES, blame

log = logging.getLogger("deepspec")


def notify(manager: pluggy.PluginManager, notice: str, **facts: Any) -> None:
    """Call the hook of that name in every plugin. A failure is a warning that names the plugin and what it raised."""
    plugins = manager.get_plugins()
    for plugin in plugins:
        caller = manager.subset_hook_caller(notice, [other for other in plugins if other is not plugin])
        try:
            caller(**facts)
        except FAILURES as error:
            name = manager.get_name(plugin)
            log.warning("plugin %s failed in %s, and the run goes on: %s", name, notice, blame(error))
