"""Arguments of the Python interface that are no options: paths, names of models, lists of stages and tasks, flags.

Knows what a caller may have meant; not what the names stand for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepspec_core.errors import ConfigError


def path_of(value: Any, argument: str, *, expected: str) -> Path:
    """The path that an argument says.

    ConfigError where it is none, and where it is empty: an empty path would be the folder that Python runs in.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise _wrong(argument, "path", value, expected)
    return Path(value)


def name_of(value: Any, argument: str, *, expected: str) -> str:
    """The name that an argument says, as text or as a path. ConfigError where it is neither, or empty."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise _wrong(argument, "name", value, expected)
    return str(value)


def names_of(value: Any, argument: str) -> Sequence[str]:
    """The list of names that an argument says, paths as text.

    ConfigError for a text alone, which would be read letter by letter.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(name, str | os.PathLike) for name in value):
        fix = f"Write [{value!r}]." if isinstance(value, str) and value else None
        raise _wrong(argument, "list of names", value, "a list of texts", fix)
    return [str(name) for name in value]


def flag_of(value: Any, argument: str) -> bool:
    """The answer that an argument says. ConfigError for all but True and False: the text "no" would count as True."""
    if not isinstance(value, bool):
        raise _wrong(argument, "answer", value, "True or False")
    return value


def _wrong(argument: str, what: str, value: Any, expected: str, fix: str | None = None) -> ConfigError:
    return ConfigError(
        f"the argument `{argument}` is no {what}",
        where=f"the argument `{argument}`",
        found=repr(value)[:80],
        expected=expected,
        fix=fix,
    )
