"""Turn what cattrs and attrs raise into errors a user can act on: path, found, expected, nearest name.

Knows types in words and how validation errors nest; knows no section of the run file in particular.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from attrs import Attribute, fields, has
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)

from deepspec_core.errors import ConfigError, DeepSpecError, PluginError, nearest
from deepspec_core.layers.options import CONFIG_NAMES
from deepspec_core.plugins.references import blame, message_of

MISSING = "missing key"
_LONGEST = 100
_WORDS = {
    bool: ("true or false", "booleans"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text in quotes", "texts"),
    Path: ("a path in quotes", "paths"),
}


class Mismatch(Exception):
    """A value that is not what its key takes. `known` are the names it could have been, for a suggestion."""

    def __init__(self, found: object, expected: str, known: Iterable[str] = ()) -> None:
        super().__init__(expected)
        self.found, self.expected, self.known = found, expected, tuple(known)


class UnknownKeys(Exception):
    """Keys that a section does not have; `known` are those it has."""

    def __init__(self, keys: Iterable[str], known: Iterable[str]) -> None:
        super().__init__()
        self.keys, self.known = sorted(keys), tuple(known)


def keys_of(section: type[Any]) -> list[str]:
    """The keys a run file may write in a section, in order: its attributes, but for those that loading fills in."""
    return [attribute.name for attribute in fields(section) if attribute.metadata.get("key", True)]


def is_union(type_: Any) -> bool:
    """`X | Y` or `Optional[X]`."""
    return get_origin(type_) in (Union, types.UnionType)


def words(type_: Any, *, many: bool = False) -> str:
    """A type as a run file's reader thinks of it: "a list of whole numbers"."""
    origin, arguments = get_origin(type_), get_args(type_)
    if type_ in _WORDS:
        return _WORDS[type_][many]
    if is_union(type_):
        members = [words(member, many=many) for member in arguments if member is not type(None)]
        return " or ".join(dict.fromkeys(members))
    if origin is Literal:
        return "one of " + ", ".join(map(shown, arguments))
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        kinds = {words(member, many=True) for member in arguments}
        listed = f"of {len(arguments)} {kinds.pop()}" if len(kinds) == 1 else f"of {', '.join(map(words, arguments))}"
        return f"lists {listed}" if many else f"a list {listed}"
    if origin is not None and issubclass(origin, Mapping):
        return f"{'tables' if many else 'a table'} of {words(arguments[1], many=True)}"
    if origin is not None and arguments:
        return f"{'lists' if many else 'a list'} of {words(arguments[0], many=True)}"
    if has(type_):
        return "tables" if many else f"a table with the keys {', '.join(keys_of(type_))}"
    return str(getattr(type_, "__name__", type_))


def shown(value: object) -> str:
    """A value as a run file would write it, cut where long."""
    if isinstance(value, bool | str | list | tuple):
        text = json.dumps(value, ensure_ascii=False, default=str)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key} = {shown(item)}" for key, item in value.items()) + "}"
    else:
        text = str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def found(value: object) -> str:
    """The value and what kind of thing it is."""
    for type_, kind in ((bool, "a boolean"), (int, "a whole number"), (float, "a number"), (str, "text")):
        if isinstance(value, type_):
            return f"{shown(value)} ({kind})"
    if isinstance(value, Mapping):
        return f"{shown(value)} (a table)"
    return f"{shown(value)} (a list)" if isinstance(value, list | tuple) else shown(value)


def of_validator(error: Exception, attribute: Attribute[Any], type_: Any, value: object) -> Mismatch:
    """A validator's complaint. attrs' own say "'lr' must be > 0: -1" and carry the options of `in_`."""
    message = message_of(error)
    options = next((part for part in error.args[2:3] if not isinstance(part, str | type)), ())
    if " must be in " in message and isinstance(options, Iterable):
        known = [str(option) for option in options]
        return Mismatch(value, "one of " + ", ".join(known), known)
    _, _, rule = message.partition(f"'{attribute.name}' must be ")
    if rule:
        limit = rule.removesuffix(f": {value}")
        return Mismatch(value, f"{words(type_)}, {limit}" if limit[:1] in "<>=" else limit)
    pattern = next((part.pattern for part in error.args if isinstance(part, re.Pattern)), None)
    return Mismatch(value, f"text that matches {pattern}" if pattern else message)


def explain(error: Exception, path: str, *, siblings: Mapping[str, Sequence[str]]) -> list[DeepSpecError]:
    """Every problem inside a (nested) validation error.

    `siblings` maps a key to the paths of other sections that have it, for keys written into the wrong one.
    """
    if isinstance(error, BaseValidationError):
        problems: list[DeepSpecError] = []
        for inner in error.exceptions:
            problems += explain(inner, _below(path, inner), siblings=siblings)
        return problems
    if isinstance(error, ForbiddenExtraKeysError):
        error = UnknownKeys(error.extra_fields, keys_of(error.cl))
    if isinstance(error, UnknownKeys):
        return [unknown_key(path, key, error.known, siblings) for key in error.keys]
    note = _noted(error, AttributeValidationNote)
    if isinstance(error, KeyError) and note and error.args == (note.name,):
        return [ConfigError(MISSING, where=path, expected=words(note.type))]
    if isinstance(error, Mismatch):
        close = nearest(error.found, error.known) if isinstance(error.found, str) else None
        return [
            ConfigError(
                "wrong value",
                where=path,
                found=found(error.found),
                expected=error.expected,
                fix=f"write {close!r}" if close else None,
            )
        ]
    if isinstance(error, DeepSpecError):
        return [type(error)(error.problem, where=path, found=error.found, expected=error.expected, fix=error.fix)]
    if not isinstance(error, ValueError | TypeError):
        return [PluginError("a check of this key failed", where=path, found=blame(error))]
    return [ConfigError("wrong value", where=path, found=message_of(error))]


def unknown_key(path: str, key: str, known: Sequence[str], siblings: Mapping[str, Sequence[str]]) -> ConfigError:
    """A key that its section does not have."""
    close = nearest(CONFIG_NAMES.get(key, key), known)
    fix = f"write {close!r}" if close else None
    if fix is None and key in siblings:
        fix = f"move it to {' or '.join(siblings[key])}"
    return ConfigError(
        "unknown key", where=f"{path}.{key}" if path else key, found=key, expected=_one_of(known), fix=fix
    )


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}" if names else "no keys"


def _noted(error: BaseException, kind: type[Any]) -> Any:
    return next((note for note in getattr(error, "__notes__", ()) if isinstance(note, kind)), None)


def _below(path: str, error: BaseException) -> str:
    if note := _noted(error, AttributeValidationNote):
        return f"{path}.{note.name}"
    if note := _noted(error, IterableValidationNote):
        return f"{path}[{note.index}]" if isinstance(note.index, int) else f"{path}.{note.index}"
    return path
