"""A draft that is not trained, named in one text: `TYPE`, `TYPE:VALUE` or `TYPE:key=value,key=value`.

VALUE is that of the one option that has no default. Values are read as `--set` reads them. Knows names and options;
makes no draft. Imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import NOTHING, fields

from deepspec_core.config.explain import explain, keys_of
from deepspec_core.config.overrides import apply_override
from deepspec_core.config.schema import DraftOptions
from deepspec_core.config.structure import strict_converter
from deepspec_core.disk import is_folder
from deepspec_core.errors import ConfigError
from deepspec_core.plugins.registry import Registry


def untrained_of(text: str, *, base: Path, registry: Registry) -> DraftOptions | None:
    """[draft] of the draft that `text` names; None where it names a checkpoint.

    A folder of that name wins. ConfigError, with every problem, for options that the draft type does not take.
    """
    kind, colon, rest = text.partition(":")
    if kind not in registry.names("draft") or is_folder(base / Path(text).expanduser()):
        return None
    spec = registry.get("draft", kind)
    if spec.trained:
        return None
    tables: dict[str, Any] = {"draft": {"type": kind}}
    if colon:
        for part in _parts(rest, spec.options, text):
            apply_override(tables, f"draft.{part}")
    try:
        made: DraftOptions = strict_converter(registry).structure(tables["draft"], DraftOptions)
        return made
    except Exception as error:
        problems = explain(error, f"{kind}:", siblings={})
    for problem in problems:
        problem.where = str(problem.where).replace(":.", ":")
    raise ConfigError(f"this is no draft of type {kind!r}: {text}", problems=problems)


def listed(text: str, registry: Registry) -> list[str]:
    """The names in a list with commas between them. What begins with no draft type is an option of the one before."""
    kinds, names = registry.names("draft"), list[str]()
    for part in text.split(","):
        if names and part.partition(":")[0] not in kinds:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names


def _parts(rest: str, options: type[Any] | None, text: str) -> list[str]:
    """key=value, one an option."""
    keys = [] if options is None else keys_of(options)
    if rest.partition("=")[0] in keys:
        return rest.split(",")
    needed = [] if options is None else [one.name for one in fields(options) if one.default is NOTHING]
    if len(needed) != 1:
        raise ConfigError(
            "a draft's options are given as key=value",
            where=text,
            found=rest,
            expected=f"options among {', '.join(keys)}" if keys else "none: this draft type has no options",
        )
    return [f"{needed[0]}={rest}"]
