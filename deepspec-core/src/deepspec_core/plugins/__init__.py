"""What a plugin is written with: the hook marker, and the specs that say what it offers.

A plugin's `plugin.py` imports these names and nothing heavier. The hooks and their contracts are in hooks.py.
"""

from deepspec_core.plugins.hooks import hookimpl
from deepspec_core.plugins.specs import (
    BuiltinSpec,
    ComponentSpec,
    DraftModelSpec,
    ExportSpec,
    Recipe,
    TargetAdapterSpec,
    TaskSpec,
)

__all__ = [
    "BuiltinSpec",
    "ComponentSpec",
    "DraftModelSpec",
    "ExportSpec",
    "Recipe",
    "TargetAdapterSpec",
    "TaskSpec",
    "hookimpl",
]
