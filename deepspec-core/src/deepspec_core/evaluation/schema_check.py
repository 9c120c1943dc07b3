"""Checks JSON against a JSON Schema, and finds the first place that does not conform.

This file knows the parts of JSON Schema that metrics.schema.json uses, except for keys that must occur together. Keys
that the schema does not have are accepted, because later versions may have more. It does not know any figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

_TYPES: Final = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def first_fault(content: Any, schema: Mapping[str, Any], *, complete: bool = True) -> str | None:
    """The first value that the schema refuses, as in "results[0].samples = 'x'"; None if there is none.

    Keys that the schema requires may be missing, unless `complete` is true.
    """
    return next(_faults(content, schema, schema, "", complete), None)


def _faults(value: Any, node: Mapping[str, Any], whole: Mapping[str, Any], at: str, complete: bool) -> Iterator[str]:
    if "$ref" in node:
        yield from _faults(value, whole["$defs"][node["$ref"].rpartition("/")[2]], whole, at, complete)
    if not _is_such(value, node):
        yield f"{at or 'all of it'} = {value!r}"[:120]
        return
    if isinstance(value, dict):
        if complete:
            yield from (f"{at or 'the file'} without {name}" for name in node.get("required", ()) if name not in value)
        others = node.get("additionalProperties")
        for name, inner in value.items():
            inside = node.get("properties", {}).get(name, others if isinstance(others, dict) else {})
            yield from _faults(inner, inside, whole, f"{at}.{name}" if at else name, complete)
    if isinstance(value, list) and "items" in node:
        for index, inner in enumerate(value):
            yield from _faults(inner, node["items"], whole, f"{at}[{index}]", complete)
    if "anyOf" in node:
        found = [next(_faults(value, one, whole, at, complete), None) for one in node["anyOf"]]
        if None not in found:
            # If the fault of an alternative lies inside the value, that alternative was probably meant.
            yield max((one for one in found if one), key=lambda one: not one.startswith(f"{at} = "))
    if "not" in node and not any(_faults(value, node["not"], whole, at, True)):
        yield f"{at} with keys that exclude each other"
    if "if" in node:
        meant = "else" if any(_faults(value, node["if"], whole, at, True)) else "then"
        yield from _faults(value, node.get(meant, {}), whole, at, complete)


def _is_such(value: Any, node: Mapping[str, Any]) -> bool:
    """Whether the value itself conforms to the node. Values inside it are not looked at."""
    kinds = node.get("type", [])
    if kinds and not any(_is_of(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if "const" in node and not (type(value) is type(node["const"]) and value == node["const"]):
        return False
    if "enum" in node and value not in node["enum"]:
        return False
    if isinstance(value, list):
        return bool(node.get("minItems", 0) <= len(value) <= node.get("maxItems", math.inf))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number or bool(node.get("minimum", -math.inf) <= value <= node.get("maximum", math.inf))


def _is_of(value: Any, kind: str) -> bool:
    if kind == "integer":
        return type(value) is int
    if kind == "number":
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return isinstance(value, _TYPES[kind])
