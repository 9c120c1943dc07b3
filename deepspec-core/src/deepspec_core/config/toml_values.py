"""Single values as TOML, on one line. Knows no schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w


def toml(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return tomli_w.dumps({"text": value}).removeprefix("text = ").strip()
    if isinstance(value, Mapping):
        given = {key: entry for key, entry in value.items() if entry is not None}
        return "{" + ", ".join(f"{toml_key(key)} = {toml(entry)}" for key, entry in given.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return repr(value)


def toml_key(key: str) -> str:
    """A key as TOML: in quotation marks where it is not of letters, digits, "_" and "-" alone."""
    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")
