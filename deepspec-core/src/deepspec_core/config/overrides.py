"""`--set key=value`: put single values into the run file's tables before they are structured.

The value is read as TOML; what is no TOML and looks like a bare word is text. Knows no schema: a wrong type or an
unknown key is found where every other one is.
"""

from __future__ import annotations

import datetime
from typing import Any

import tomli

from deepspec_core.errors import ConfigError


def apply_override(tables: dict[str, Any], text: str) -> str:
    """Set one value in place, creating tables on the way, and return its dotted path.

    ConfigError where `text` is not key=value, its value cannot be read, or the path leads through something else.
    """
    where = f"--set {text}"
    key, equals, value = text.partition("=")
    path = _path(key) if equals else None
    if not path:
        raise ConfigError("not an override", where=where, found=text, expected="KEY=VALUE, as in train.lr=3e-4")
    table = tables
    for depth, part in enumerate(path[:-1], start=1):
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                "not a table",
                where=where,
                found=f"{'.'.join(path[:depth])} is "
                f"{'a list, which can only be set as a whole' if isinstance(inner, list) else 'a value'}",
                expected="a table",
            )
        table = inner
    table[path[-1]] = _value(value.strip(), where)
    return ".".join(path)


def _path(key: str) -> list[str]:
    try:
        table: Any = tomli.loads(f"{key.strip()} = 0")
    except tomli.TOMLDecodeError:
        return []
    path = []
    while isinstance(table, dict):
        if len(table) != 1:
            return []
        name, table = next(iter(table.items()))
        path.append(name)
    return path


def _value(text: str, where: str) -> Any:
    try:
        parsed = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError as error:
        if text and text[0] not in "[{\"'" and "\n" not in text:
            return text
        raise ConfigError(
            "not a TOML value",
            where=where,
            found=text or "nothing",
            expected="a value as in the run file",
            fix="put text in quotes" if text[:1] in ("[", "{") else None,
        ) from error
    if parsed.keys() != {"value"}:
        raise ConfigError("more than one value", where=where, found=text, expected="one value")
    value = parsed["value"]
    # No key takes a date: a word that happens to be one is a word.
    return text if isinstance(value, datetime.date | datetime.time) else value
