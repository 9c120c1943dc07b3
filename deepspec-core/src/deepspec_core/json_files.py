"""A file that holds one JSON object, read as somebody else's: whole, bounded, and nothing taken for something else.

Knows files and JSON; not what an object means.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from deepspec_core.errors import DeepSpecError

# The longest of published config files has some hundred kilobytes.
MOST_BYTES: Final = 64 * 2**20
_WORDS: Final = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}


def read_object(
    path: Path, *, kind: type[DeepSpecError], strict: bool = True, fix: str | None = None
) -> dict[str, Any]:
    """The object of a file. `kind` of error where the file cannot be read, is too large, or holds anything else.

    `strict` refuses what JSON readers disagree on as well: a key that comes twice, NaN, Infinity, and numbers that are
    read as infinite. FileNotFoundError is left to the caller, who knows what a missing file means.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise kind(
                f"{path.name} is too large", where=path, found=f"{size:,} bytes", expected="a JSON object", fix=fix
            )
        refusing = {"object_pairs_hook": _once, "parse_constant": _refuse, "parse_float": _finite}
        hooks: dict[str, Any] = refusing if strict else {}
        content = json.loads(path.read_bytes().decode("utf-8"), **hooks)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise kind(f"{path.name} cannot be read", where=path, found=error, expected="a JSON object", fix=fix) from error
    except RecursionError:
        raise kind(
            f"{path.name} cannot be read", where=path, found="JSON nested too deep", expected="a JSON object", fix=fix
        ) from None
    if not isinstance(content, dict):
        found = type(content).__name__
        raise kind(f"{path.name} cannot be read", where=path, found=found, expected="a JSON object", fix=fix)
    return content


def value_of(
    fields: dict[str, Any], key: str, type_: type, *, path: Path, kind: type[DeepSpecError], absent: Any = None
) -> Any:
    """The value of a key, of just this type (true is no number); `absent` where there is none or null."""
    value = fields.get(key)
    if value is None:
        return absent
    if type(value) is not type_:
        raise kind(
            f"{path.name} cannot be used", where=f"{path}: {key}", found=repr(value)[:80], expected=_WORDS[type_]
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number
