"""Code of a plugin that calls sys.exit(): an error of the plugin's, and not the end of the process.

Knows tracebacks. Does not know kinds of components, or what the code was called for.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from deepspec_core.errors import PluginError
from deepspec_core.plugins.origin import distribution_of
from deepspec_core.plugins.references import blame

# Only passes calls on, or is where they begin.
_NOT_TO_BLAME = {"deepspec_core", "click", "torch", *sys.stdlib_module_names}


@contextmanager
def no_exit() -> Iterator[None]:
    """Within it runs code of plugins. PluginError, with the plugin's name, if that calls sys.exit().

    Core never does so itself within such a block. Without this, work that was cut short could end with exit code 0.
    """
    try:
        yield
    except SystemExit as error:
        module = _caller(error.__traceback__)
        raise PluginError(
            "code of a plugin called sys.exit()" if module else "sys.exit() was called",
            where=distribution_of(module) if module else None,
            found=blame(error),
            expected="an error that says what is wrong",
            fix="correct the plugin, or leave it out of the run: --no-plugin NAME",
        ) from error


def _caller(trace: TracebackType | None) -> str | None:
    """The module of the innermost frame that is a plugin's, or of a library that a plugin uses."""
    names = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(trace)]
    return next((name for name in reversed(names) if name.partition(".")[0] not in _NOT_TO_BLAME), None)
