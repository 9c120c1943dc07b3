"""Imports what a plugin names as text, and says in one line why an import failed.

Knows Python's import system and tracebacks. Does not know hooks, kinds or records.
"""

from __future__ import annotations

import importlib
import os
import traceback
from typing import Any, Final

import attr
import attrs

from deepspec_core.errors import PluginError, nearest

# What code of a plugin raises where it fails. sys.exit() there must not end the process: its exit code could be 0.
# Being asked to stop (stopping.py) is no failure, and is neither of them.
FAILURES: Final = (Exception, SystemExit)

_HERE = os.path.dirname(__file__)
# Frames of these files stand between an author's mistake and core. They are never the place of the mistake.
_MACHINERY = (
    "<",  # frozen import system, generated constructors
    *(os.path.join(os.path.dirname(str(package.__file__)), "") for package in (importlib, attr, attrs)),
    __file__,
    *(
        os.path.join(_HERE, name)
        for name in ("discovery.py", "registry.py", "guarded.py", "guarded_cache.py", "exits.py")
    ),
)


def resolve(reference: str) -> Any:
    """The object that "module:attribute" names, imported now. PluginError if the module or the attribute is missing."""
    module_name, _, attribute = reference.partition(":")
    try:
        value: Any = importlib.import_module(module_name)
    except FAILURES as error:
        raise PluginError(f"cannot import {module_name}", where=reference, found=blame(error)) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            close = nearest(part, dir(value))
            raise PluginError(
                f"{module_name} has no {part!r}", where=reference, fix=f"name {close!r} instead" if close else None
            )
        value = getattr(value, part)
    return value


def message_of(error: BaseException) -> str:
    """The error's text on one line. attrs' errors also hold the attribute and the value; only their message is used."""
    packed = any(isinstance(part, attrs.Attribute) for part in error.args)
    return " ".join(str(error.args[0] if packed else error).split())


def blame(error: BaseException) -> str:
    """The exception's type, its message, and the file and line of the author's code that raised it, if there is any."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    text = f"{type(error).__name__}: {message_of(error)}".removesuffix(": ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_MACHINERY)]
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text
