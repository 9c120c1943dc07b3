"""Write a run file's effective values back as TOML that loads to the same options.

Values that are None are left out, because None always means "not given". Some tables have keys that a plugin decides;
here they are core's own keys and the rest.
"""

from __future__ import annotations

from enum import Enum
from pathlib import PurePath
from typing import Any

import tomli_w
from attrs import Attribute, asdict

from deepspec_core.config.load import RunFile
from deepspec_core.config.schema import TermOptions


def render(run_file: RunFile) -> str:
    """Every effective value, sections and keys in the schema's order."""
    tables = asdict(run_file, value_serializer=_plain)
    # Top-level keys stand before the first table.
    ordered = {"required_plugins": tables.pop("required_plugins"), **tables}
    ordered["draft"] = _merged(ordered["draft"])
    ordered["loss"]["weighting"] = _merged(ordered["loss"]["weighting"])
    for name, entry in run_file.loss.terms.items():
        if isinstance(entry, TermOptions):
            table = ordered["loss"]["terms"][name]
            ordered["loss"]["terms"][name] = {"coefficient": table["coefficient"], **table["options"]}
    return tomli_w.dumps(_given(ordered))


def _plain(_instance: object, _attribute: Attribute[Any] | None, value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    return value.value if isinstance(value, Enum) else value


def _merged(section: dict[str, Any]) -> dict[str, Any]:
    """`type`, then the component's options, then core's other keys."""
    own = {key: value for key, value in section.items() if key not in ("type", "options")}
    return {"type": section["type"], **(section["options"] or {}), **own}


def _given(table: dict[str, Any]) -> dict[str, Any]:
    """Without None, and without tables that this leaves empty of the values they had."""
    given: dict[str, Any] = {}
    for key, value in table.items():
        if value is None:
            continue
        if isinstance(value, dict):
            inner = _given(value)
            if inner or not value:
                given[key] = inner
        elif isinstance(value, list | tuple | set | frozenset):
            given[key] = [_given(item) if isinstance(item, dict) else item for item in value]
        else:
            given[key] = value
    return given
