"""docs/metrics-file.md: every key of metrics.json with its type and meaning, made from the JSON Schema.

This file knows the parts of JSON Schema that metrics.schema.json uses. It does not know any figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepspec_core.evaluation.metrics_file import VERSION, schema

_HEAD = f"""# metrics.json

The evaluate stage writes the figures of a run to `metrics.json`. The file says its `version`, which is {VERSION}.
Commands that read it refuse a version that they do not know, and read files that were written before there were
versions.

The layout is a JSON Schema, which this page is made from: `deepspec_core/evaluation/metrics.schema.json` in the package
deepspec-core. `[]` stands for each element of a list. Keys in italics may be missing. [Measuring](measuring.md) says
what the figures mean.
"""
_NAMES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def markdown() -> str:
    """The page as Markdown."""
    whole = schema()
    lines = [_HEAD, "| key | type | meaning |", "|---|---|---|"]
    for key, kind, meaning in _keys(whole, whole, ""):
        lines.append(f"| {key} | {kind} | {meaning} |")
    return "\n".join([*lines, ""])


def _keys(node: Mapping[str, Any], whole: Mapping[str, Any], above: str) -> Iterator[tuple[str, str, str]]:
    required = node.get("required", ())
    for name, given in node.get("properties", {}).items():
        found = _resolved(given, whole)
        key = f"`{above}{name}`" if name in required else f"*`{above}{name}`*"
        yield key, _type(found, whole), found["description"]
        some = _that_is_some(found, whole)
        items = "array" in _kinds(some)
        inside = _resolved(some.get("items", {}), whole) if items else some
        yield from _keys(inside, whole, f"{above}{name}{'[]' if items else ''}.")


def _that_is_some(node: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """The alternative that is not null, of a node with two alternatives."""
    forms = (_resolved(one, whole) for one in node.get("anyOf", ()))
    return next((one for one in forms if _kinds(one) != ["null"]), node)


def _kinds(node: Mapping[str, Any]) -> list[str]:
    kinds = node.get("type", [])
    return [*kinds] if isinstance(kinds, list) else [kinds]


def _resolved(node: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """The node with its reference resolved. The node's own description replaces that of the referenced node."""
    if "$ref" not in node:
        return dict(node)
    return {**whole["$defs"][node["$ref"].rpartition("/")[2]], **node}


def _type(node: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    if "const" in node:
        return f"`{node['const']}`"
    if "anyOf" in node:
        return " or ".join(_type(_resolved(one, whole), whole) for one in node["anyOf"])
    return " or ".join(_kind(kind, node, whole) for kind in _kinds(node))


def _kind(kind: str, node: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    if kind == "object":
        return "table"
    if kind == "array":
        item = _type(_resolved(node["items"], whole), whole)
        if item == "table":
            return "list of tables"
        return f"list of ({item})" if " or " in item else f"list of {item}"
    return _NAMES[kind]
