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
from deepspec_core.errors import ConfigError, nearest
from deepspec_core.plugins.registry import Registry


def untrained_of(text: str, *, base: Path, registry: Registry, where: str = "draft") -> DraftOptions | None:
    """[draft] of the draft that `text` names; None where it names a checkpoint: a folder, or a Hub id with its owner.

    A folder of that name wins. ConfigError for a text that is neither, naming `where` it was given; and, with every
    problem, for options that the draft type does not take.
    """
    spelled, colon, rest = text.partition(":")
    if is_folder(base / Path(text).expanduser()):
        return None
    kind = _kinds(registry).get(spelled)
    if kind is None and spelled not in registry.trained_drafts() and spelled in registry.names("draft"):
        registry.get("draft", spelled)  # two plugins offer it: says which
    if kind is None:
        if "/" in spelled or spelled.startswith((".", "~")):
            return None
        raise no_such_draft(text, where=where, registry=registry)
    spec = registry.get("draft", kind)
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
    """The names in a list with commas between them. `key=value` that no draft type stands before is an option of the
    one before.
    """
    kinds, names = _kinds(registry), list[str]()
    for part in text.split(","):
        if names and "=" in part and part.partition(":")[0] not in kinds:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names


def no_such_draft(text: str, *, where: str, registry: Registry) -> ConfigError:
    """The error for a text that names no draft without training, and no folder or Hub id either."""
    spelled, kinds = text.partition(":")[0], _kinds(registry)
    if spelled in registry.trained_drafts():
        problem = f"a draft of type {spelled!r} is trained, so its checkpoint is named: a directory or a Hub id"
    else:
        problem = "this names no draft: no directory, and no draft type that works without training"
    close = nearest(spelled, kinds)
    return ConfigError(
        problem,
        where=where,
        found=text,
        expected=f"{' or '.join(sorted(set(kinds.values())))}, with options as in TYPE:key=value",
        fix=f"write {close!r}"
        if close
        else "Give a checkpoint as a directory or as owner/name, or install the package that offers the draft type: "
        "docs/baselines.md names it. That of prompt lookup is examples/plugins/deepspec-lookup.",
    )


def _kinds(registry: Registry) -> dict[str, str]:
    """The draft types that are not trained, by every name they go by."""
    return {name: spec.name for spec in registry.untrained_drafts() for name in (spec.name, *spec.also_called)}


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
