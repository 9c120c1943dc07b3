"""The reference of all keys of a run file: type, default, limits and meaning, read from the schema itself.

A section is an attrs class. Its docstring explains each key on a line `key: meaning`, which may continue on indented
lines. Sections of plugins (draft types, weightings) are read the same way; a plugin's key without an explanation is
shown with its type and default only. Knows schemas; does not know how a run file is read. Imports nothing heavy.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from attrs import NOTHING, Attribute, Factory, asdict, evolve, fields, frozen, has, resolve_types

from deepspec_core.config.explain import is_union, keys_of, words
from deepspec_core.config.load import RunFile
from deepspec_core.config.schema import DraftOptions, TermOptions, WeightingOptions
from deepspec_core.config.toml_values import toml
from deepspec_core.errors import ConfigError, nearest
from deepspec_core.plugins.registry import Registry

_PAGE = """# The run file

A run is described by one TOML file. `deepspec config check FILE` reports all of its mistakes at once. The check also
reads the config of a target on this machine and the file that `target.chat_template` names. `deepspec config show FILE`
prints the file with every default filled in. Paths are relative to the file. Unknown keys are errors, and so are values
of the wrong type, such as `"8"` for `8`.

`--set train.lr=3e-4` overrides one key and leaves the file as it is. The commands `run`, `estimate`, `config check`,
`config show`, `data show` and `data prepare` take it.

`deepspec config keys --markdown` wrote this page. `deepspec config keys train` prints one section on the terminal.
Sections that plugins extend then show the keys of the installed plugins."""
# Bounds from here on only catch slips of the hand, and are not shown.
_OF_NO_INTEREST = 1000
_MEANING = re.compile(r"(\w+): (.*)")
# Sections whose `type` names a component with keys of its own: the kind of component.
_TYPED = {DraftOptions: "draft", WeightingOptions: "weighting"}


@frozen(kw_only=True)
class KeyFacts:
    """One key. `default` is written as in a run file; it is None if the key is required, and "" if there is no default
    but the key may be left out."""

    name: str
    type: str
    default: str | None
    limits: str
    meaning: str


@frozen(kw_only=True)
class SectionFacts:
    """One section, or a table inside one. `path` is its name in a run file; `about` says in a sentence or two what it
    is for."""

    path: str
    about: str
    keys: tuple[KeyFacts, ...]


def meanings(section: type[Any]) -> dict[str, str]:
    """The meaning of each key, from the docstrings of a section's class and of its base classes."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if has(base):
            found |= _listed(base)[1]
    return found


def about(section: type[Any]) -> str:
    """The part of a section's docstring before its keys."""
    return _listed(section)[0]


def sections(registry: Registry) -> list[SectionFacts]:
    """Every section of a run file in its order, with the tables inside it, and the sections that plugins shape."""
    resolve_types(RunFile)
    own = [attribute for attribute in fields(RunFile) if not has(attribute.type or object)]
    top = tuple(_key(attribute, meanings(RunFile)) for attribute in own)
    found = [SectionFacts(path="top-level", about="Keys that stand before the first section.", keys=top)]
    for attribute in fields(RunFile):
        if has(attribute.type or object):
            found += list(_with_tables(attribute.name, attribute.type, registry))
    return found


def sections_named(name: str, registry: Registry) -> list[SectionFacts]:
    """The section of that name and the tables inside it. ConfigError, with the nearest name, if there is none."""
    every = sections(registry)
    chosen = [section for section in every if section.path == name or section.path.startswith((f"{name}.", f"{name} "))]
    if not chosen:
        known = list(dict.fromkeys(section.path.split(" ")[0] for section in every))
        close = nearest(name, known)
        raise ConfigError(
            "no such section of a run file",
            found=name,
            expected=f"one of {', '.join(known)}",
            fix=f"write {close!r}" if close else None,
        )
    return chosen


def markdown(every: Iterable[SectionFacts]) -> str:
    """The sections as a page: a table each."""
    lines = [_PAGE]
    for section in every:
        lines += ["", f"## {section.path}", "", section.about, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in section.keys:
            default = {None: "required", "": "left out"}.get(key.default, f"`{key.default}`")
            kind = f"{key.type}, {key.limits}" if key.limits else key.type
            row = (f"`{key.name}`", kind, default, key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines).strip("\n") + "\n"


def _listed(section: type[Any]) -> tuple[str, dict[str, str]]:
    """A docstring's prose, and its `key: meaning` lines."""
    names, prose, found, current = set(keys_of(section)), list[str](), dict[str, str](), ""
    for line in inspect.cleandoc(section.__doc__ or "").splitlines():
        match = _MEANING.match(line)
        if match and match[1] in names:
            current = match[1]
            found[current] = match[2]
        elif current and line.startswith(" "):
            found[current] += " " + line.strip()
        else:
            current = ""
            prose.append(line)
    return " ".join(" ".join(prose).split()), found


def _with_tables(path: str, section: Any, registry: Registry) -> Iterator[SectionFacts]:
    """The section, then the tables that its keys hold, then the sections of all components that its `type` may name."""
    resolve_types(section)
    if section is TermOptions:
        yield from _terms(path.removesuffix(" (an entry)"), registry)
        return
    yield _section(path, section)
    for attribute in fields(section):
        for inner, many in _tables_in(attribute.type):
            yield from _with_tables(f"{path}.{attribute.name}{many}", inner, registry)
    kind = _TYPED.get(section)
    for name in registry.names(kind) if kind else ():
        options = registry.get(kind or "", name).options
        if options is not None:
            yield from _with_tables(f'{path} (type "{name}")', options, registry)


def _terms(path: str, registry: Registry) -> Iterator[SectionFacts]:
    """The table of each loss term that has keys of its own, and the tables inside it."""
    for name in registry.names("loss"):
        options = registry.get("loss", name).options
        if options is not None:
            first, *inner = _with_tables(f'{path} (term "{name}")', options, registry)
            yield evolve(first, keys=(*_section(path, TermOptions).keys, *first.keys))
            yield from inner


def _tables_in(type_: Any) -> Iterator[tuple[type[Any], str]]:
    """attrs classes inside a key's type: itself, the members of a union, the entries of a list or a table."""
    if has(type_):
        yield type_, ""
        return
    inside = "" if is_union(type_) else " (an entry)"
    for argument in get_args(type_):
        if has(argument):
            yield argument, inside
        else:
            yield from ((inner, inside) for inner, _ in _tables_in(argument))


def _section(path: str, section: type[Any]) -> SectionFacts:
    said, names = meanings(section), keys_of(section)
    keys = tuple(_key(attribute, said) for attribute in fields(section) if attribute.name in names)
    # "[train]: the optimizer ..." says again what the heading says.
    prose = re.sub(r"^\[[\w.]+\](?: \w+)?( = \{.*?\})?: ", "", about(section))
    return SectionFacts(path=path, about=prose[:1].upper() + prose[1:], keys=keys)


def _key(attribute: Attribute[Any], said: Mapping[str, str]) -> KeyFacts:
    kind = _words(attribute.type)
    limits = [limit for limit in _limits(attribute.validator) if not (kind.startswith("one of") and "one of" in limit)]
    return KeyFacts(
        name=attribute.name,
        type=kind,
        default=_default(attribute),
        limits=", ".join(dict.fromkeys(limits)),
        meaning=said.get(attribute.name, ""),
    )


def _words(type_: Any) -> str:
    """The type in the words of error messages, but a table's keys are left out: they are listed on their own."""
    return re.sub(r"a table with the keys [^|]*$", "a table", words(type_))


def _default(attribute: Attribute[Any]) -> str | None:
    default: Any = attribute.default
    if default is NOTHING:
        return None
    if isinstance(default, Factory):  # type: ignore[arg-type]
        default = default.factory()
    if default is None or has(type(default)):
        given = {} if default is None else {key: value for key, value in asdict(default).items() if value is not None}
        own = set(keys_of(type(default))) if default is not None else set()
        given = {key: value for key, value in given.items() if key in own}
        return toml(given) if given else ""
    return toml(default)


def _limits(validator: Any) -> Iterator[str]:
    """The limits that validators set, in words. Types are shown elsewhere; a plugin's own validators are left out."""
    for inner in (*getattr(validator, "_validators", ()), *getattr(validator, "validators", ())):
        yield from _limits(inner)
    for name in ("validator", "member_validator"):
        if (inner := getattr(validator, name, None)) is not None:
            yield from _limits(inner)
    if hasattr(validator, "bound") and hasattr(validator, "compare_op") and abs(validator.bound) < _OF_NO_INTEREST:
        yield f"{validator.compare_op} {validator.bound:g}"
    if isinstance(options := getattr(validator, "options", None), tuple | list | frozenset):
        yield "one of " + ", ".join(map(str, options))
    if (pattern := getattr(validator, "pattern", None)) is not None:
        yield f"matching `{pattern.pattern}`"
