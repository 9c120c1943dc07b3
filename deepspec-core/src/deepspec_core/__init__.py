"""DeepSpec core: train and evaluate draft models for speculative decoding.

From Python: `load_target`, `load_draft`, `generate`, `evaluate`, `train`, `RunFile` and `DeepSpecError`, imported when
they are first used, so that `import deepspec_core` is cheap. What they are is in interface/ and errors.py.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

__all__ = ["DeepSpecError", "RunFile", "evaluate", "generate", "load_draft", "load_target", "train"]

_PLACES = {
    "DeepSpecError": "errors",
    "RunFile": "config.load",
    "evaluate": "interface.evaluating",
    "generate": "interface.generating",
    "load_draft": "interface.models",
    "load_target": "interface.models",
    "train": "interface.training",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
