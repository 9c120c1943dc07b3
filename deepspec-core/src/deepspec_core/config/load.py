"""The run file, and how it is read: TOML, overrides, strict structuring, and every error at once.

Knows which sections there are and in which order things are checked. What a section holds is schema.py's. Types are
structure.py's, words explain.py's, checks across sections checks.py's. Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli
from attrs import NOTHING, field, fields, frozen, has, resolve_types
from cattrs import Converter

from deepspec_core.config.checks import check_sections
from deepspec_core.config.explain import explain, keys_of, unknown_key, words
from deepspec_core.config.overrides import apply_override
from deepspec_core.config.paths import no_path
from deepspec_core.config.schema import (
    CacheOptions,
    DataOptions,
    DraftOptions,
    EvaluateOptions,
    ExportOptions,
    FeaturesOptions,
    LossOptions,
    RegenerateOptions,
    RunOptions,
    TargetOptions,
    TrainOptions,
)
from deepspec_core.config.structure import strict_converter
from deepspec_core.errors import ConfigError, DeepSpecError, PluginError, nearest
from deepspec_core.plugins.discovery import Plugins, load_plugins
from deepspec_core.plugins.requirements import check_required


@frozen(kw_only=True)
class RunFile:
    """A whole run file.

    required_plugins: The packages that the run needs, as version requirements: ["deepspec-core>=0.2"].
    """

    run: RunOptions
    target: TargetOptions
    data: DataOptions
    draft: DraftOptions
    regenerate: RegenerateOptions = field(factory=RegenerateOptions)
    features: FeaturesOptions = field(factory=FeaturesOptions)
    cache: CacheOptions = field(factory=CacheOptions)
    loss: LossOptions = field(factory=LossOptions)
    train: TrainOptions = field(factory=TrainOptions)
    evaluate: EvaluateOptions = field(factory=EvaluateOptions)
    export: ExportOptions = field(factory=ExportOptions)
    required_plugins: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any], *, base: str = ".") -> RunFile:
        """A run file from nested mappings, as TOML would be read, checked as strictly.

        `base` is the folder that relative paths start at. ConfigError holds every problem.
        """
        return run_file_of(tables, folder=base, plugins=load_plugins())


def load_run_file(path: str | os.PathLike[str], *, overrides: Sequence[str] = (), plugins: Plugins) -> RunFile:
    """The run file at `path`, with `overrides` ("train.lr=3e-4") put in.

    ConfigError holds every problem: file not there or not TOML; else, in file order, keys, types, values, names of
    components, unmet `required_plugins`, and sections that do not fit together.
    """
    path = Path(path)
    return _checked(_read(path), overrides, str(path), path.parent, plugins)


def run_file_of(tables: Mapping[str, Any], *, folder: str | os.PathLike[str], plugins: Plugins) -> RunFile:
    """The run file that nested mappings say, relative paths starting at `folder`. ConfigError holds every problem.

    Tuples, paths, arrays and their numbers are taken as what TOML would have.
    """
    if not isinstance(tables, Mapping):
        raise ConfigError("a run file must be a nested mapping", found=type(tables).__name__, expected="a dictionary")
    try:
        key, plain = _other_key(tables), as_toml(tables)
    except RecursionError:
        raise ConfigError(
            "a run file is nested too deep", expected="a dictionary that does not contain itself"
        ) from None
    if key is not None:
        raise ConfigError(
            "a key of a run file is not text", found=repr(key)[:80], expected="names of sections and keys"
        )
    return _checked(plain, (), "the run file", Path(folder), plugins)


def _other_key(value: Any) -> Any:
    """The first key of nested mappings that is no text, None where all are."""
    if not isinstance(value, Mapping):
        return None
    found = (key if not isinstance(key, str) else _other_key(entry) for key, entry in value.items())
    return next((key for key in found if key is not None), None)


def as_toml(value: Any) -> Any:
    """A Python value in the types that TOML knows: None is left out, an array is a list, a NumPy number is a number."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: as_toml(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [as_toml(entry) for entry in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _checked(tables: dict[str, Any], overrides: Sequence[str], name: str, folder: Path, plugins: Plugins) -> RunFile:
    problems: list[DeepSpecError] = []
    overridden: set[str] = set()
    for text in overrides:
        try:
            overridden.add(apply_override(tables, text))
        except ConfigError as error:
            problems.append(error)
    sections, found = _structure(tables, plugins)
    found += check_required(sections.get("required_plugins", ()), plugins)
    found += check_sections(sections, folder, plugins.registry)
    for problem in found:
        if str(problem.where) in overridden:
            problem.found = "from --set" if problem.found is None else f"{problem.found}, from --set"
        problems.append(problem)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count} in {name}", problems=problems)
    return RunFile(**sections)


def _read(path: Path) -> dict[str, Any]:
    if (problem := no_path("the path of the run file", path)) is not None:
        raise problem
    if path.is_dir():
        raise ConfigError("the path of a run file is a folder", where=path)
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise ConfigError("cannot read the run file", where=path, found=error.strerror) from error
    except UnicodeDecodeError as error:
        raise ConfigError("not a text file", where=path, found=error, expected="TOML, in UTF-8") from error
    except tomli.TOMLDecodeError as error:
        raise ConfigError(
            "not TOML", where=f"{path}, line {error.lineno}, column {error.colno}", found=error.msg
        ) from error


def _missing(path: Path) -> ConfigError:
    if not path.parent.is_dir():
        return ConfigError("no such run file", where=path, found=f"there is no folder {path.parent}")
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    close = nearest(path.name, names) or next((name for name in names if name.endswith(".toml")), None)
    return ConfigError("no such run file", where=path, fix=f"use {path.parent / close}" if close else None)


def _structure(tables: dict[str, Any], plugins: Plugins) -> tuple[dict[str, Any], list[DeepSpecError]]:
    """The sections that are right, defaults included, and what is wrong with the others."""
    resolve_types(RunFile)
    converter = strict_converter(plugins.registry)
    siblings = _siblings()
    sections: dict[str, Any] = {}
    problems: list[DeepSpecError] = [
        unknown_key("", key, keys_of(RunFile), siblings) for key in tables if key not in keys_of(RunFile)
    ]
    for attribute in fields(RunFile):
        type_: Any = attribute.type
        if attribute.name not in tables and attribute.default is NOTHING:
            problems.append(ConfigError("missing section", where=attribute.name, expected=words(type_)))
            continue
        # An absent section is an empty one: its defaults.
        table = tables.get(attribute.name, {} if has(type_) else [])
        if type_ is LossOptions and isinstance(table, dict):
            default = _default_loss(tables.get("draft"), plugins)
            default = {key: value for key, value in default.items() if key not in table}
            wrong = _wrong_default(default, tables.get("draft"), converter, plugins)
            problems += wrong
            table = {**({} if wrong else default), **table}
            if wrong and "terms" not in table:
                continue  # what is missing from it is the algorithm's mistake too
        try:
            sections[attribute.name] = converter.get_structure_hook(type_)(table, type_)
        except Exception as error:
            problems += explain(error, attribute.name, siblings=siblings)
    return sections, problems


def _default_loss(draft: Any, plugins: Plugins) -> dict[str, Any]:
    """What the draft's algorithm asks of [loss] where the run file is silent; nothing for one that is not known."""
    try:
        return dict(plugins.registry.get("draft", draft["type"]).default_loss)
    except (PluginError, TypeError, KeyError):  # told where [draft] is read
        return {}


def _wrong_default(default: dict[str, Any], draft: Any, converter: Converter, plugins: Plugins) -> list[DeepSpecError]:
    """What is wrong with keys of [loss] that the draft's algorithm gives: its plugin's mistakes, not the run file's."""
    if not default:
        return []
    try:
        converter.get_structure_hook(LossOptions)(default, LossOptions)
    except Exception as error:
        kind = draft["type"]
        return [
            PluginError(
                f"the default loss of draft type {kind!r} cannot be used: {problem.problem}",
                where=f"{plugins.registry.provider('draft', kind)}: default_loss of {kind!r}, {problem.where}",
                found=problem.found,
                expected=problem.expected,
                fix="give these keys in [loss], or correct the plugin",
            )
            for problem in explain(error, "loss", siblings=_siblings())
        ]
    return []


def _siblings() -> dict[str, list[str]]:
    """Key -> where the schema has it."""
    places: dict[str, list[str]] = {}
    for section in fields(RunFile):
        if section.type is not None and has(section.type):
            for key in keys_of(section.type):
                places.setdefault(key, []).append(f"{section.name}.{key}")
    return places
