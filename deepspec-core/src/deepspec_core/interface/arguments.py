"""Checks of the Python interface's arguments: paths, names of models, lists of stages and tasks, flags.

Knows types and likely slips; does not know what the names stand for. options.py checks the other arguments.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspec_core.errors import ConfigError


def path_of(value: Any, argument: str, *, expected: str) -> Path:
    """The argument as a path.

    ConfigError if it is none, or empty: an empty path would mean the working directory.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise _wrong(argument, "path", value, expected)
    return Path(value)


def name_of(value: Any, argument: str, *, expected: str) -> str:
    """The argument, text or a path, as a name. ConfigError if it is neither, or empty."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise _wrong(argument, "name", value, expected)
    return str(value)


def names_of(value: Any, argument: str) -> Sequence[str]:
    """The argument as a list of names; paths become text.

    ConfigError for a single text, which Python would iterate letter by letter.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(name, str | os.PathLike) for name in value):
        fix = f"Write [{value!r}]." if isinstance(value, str) and value else None
        raise _wrong(argument, "list of names", value, "a list of texts", fix)
    return [str(name) for name in value]


def flag_of(value: Any, argument: str) -> bool:
    """The argument as a flag. ConfigError for all but True and False: the text "no" would count as True."""
    if not isinstance(value, bool):
        raise _wrong(argument, "flag", value, "True or False")
    return value


def _wrong(argument: str, what: str, value: Any, expected: str, fix: str | None = None) -> ConfigError:
    return ConfigError(
        f"the argument `{argument}` is not a {what}",
        where=f"the argument `{argument}`",
        found=repr(value)[:80],
        expected=expected,
        fix=fix,
    )
