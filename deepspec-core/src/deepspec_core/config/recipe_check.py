"""A recommended recipe, checked as strictly as a run file that has its keys; mistakes are those of its plugin.

Knows DraftModelSpec and how sections are structured. Does not know targets, or what becomes of a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import tomli
from attrs import NOTHING, asdict, fields, frozen, has

from deepspec_core.config.checks import loss_mistakes
from deepspec_core.config.explain import MISSING, UnknownKeys, explain, keys_of
from deepspec_core.config.load import as_toml, run_file_of
from deepspec_core.config.schema import MASK, LossOptions
from deepspec_core.config.structure import strict_converter
from deepspec_core.config.train_options import TrainOptions
from deepspec_core.errors import ConfigError, DeepSpecError, PluginError
from deepspec_core.plugins.discovery import Plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.plugins.specs import DraftModelSpec

_Options = TypeVar("_Options")
# Sections of a new run file that follow from its target and its data.
_OF_USER: Final = ("run.", "target.", "data.")


@frozen(kw_only=True)
class CheckedRecipe:
    """What a run file says by it: values of the draft type's options, by key; keys of [loss] and [train] as in TOML.

    `note` names all of these keys, and gives the evidence. The plugin's own tables were read once, for the check.
    """

    options: Mapping[str, Any]
    loss: Mapping[str, Any]
    train: Mapping[str, Any]
    note: str


def checked_recipe(spec: DraftModelSpec, registry: Registry) -> CheckedRecipe:
    """The recipe that `spec` recommends. PluginError names the package, and the first key that is wrong.

    A value may be an options object in the place of its table. The mask token is the target's, so no recipe gives it.
    """
    recipe = spec.recommended
    assert recipe is not None, "there is one"
    # What it is made of is the plugin's, down to the keys of its tables.
    with registry.blaming("draft", spec.name):
        read = {"options": dict(recipe.options), "loss": dict(recipe.loss), "train": dict(recipe.train)}
        evidence = str.__str__(recipe.evidence)  # a plain one, whose text cannot change after the check
        written = {part: _as_written(table) for part, table in read.items()}
        options, problems = _options(spec.options, written["options"], registry)
        for part, given in read.items():
            problems += [
                ConfigError("a run file cannot contain None", where=f"{part}.{key}", found="None", expected="a value")
                for key, value in given.items()
                if value is None
            ]
        loss, train = written["loss"], written["train"]
        problems += [*_of_loss(loss, registry), *_of_section("train", train, TrainOptions, registry)[1]]
    for problem in problems:
        raise _cannot(spec, registry, problem)
    sections = {"draft": options, "loss": loss, "train": train}
    keys = ", ".join(f"{section}.{key}" for section, table in sections.items() for key in table)
    return CheckedRecipe(
        options=options, loss=loss, train=train, note=f"The recommended recipe sets {keys}. {evidence}"
    )


def check_written(text: str, spec: DraftModelSpec, *, recommended: bool, folder: Path, plugins: Plugins) -> None:
    """PluginError where a run file with settings of `spec` is refused: sections may not fit together, or be no text.

    Keys that the user has yet to give are no mistakes of the plugin. ConfigError where what the user gave, the target
    and the data, makes a section that is refused.
    """
    try:
        text.encode()
        run_file_of(tomli.loads(text), folder=folder, plugins=plugins)
    except UnicodeEncodeError as error:
        odd = ConfigError(
            "text that is not valid Unicode", where="the run file", found=ascii(error.object[error.start])
        )
        raise _cannot(spec, plugins.registry, odd, recommended=recommended) from None
    except ConfigError as error:
        for problem in error.problems:
            if problem.problem == MISSING:
                continue
            if str(problem.where).startswith(_OF_USER):
                raise problem from None
            raise _cannot(spec, plugins.registry, problem, recommended=recommended) from None


def _cannot(
    spec: DraftModelSpec, registry: Registry, problem: DeepSpecError, *, recommended: bool = True
) -> PluginError:
    which, part = ("recommended recipe", "recommended") if recommended else ("settings", "defaults")
    return PluginError(
        f"the {which} of draft type {spec.name!r} cannot be used: {problem.problem}",
        where=f"{registry.provider('draft', spec.name)}: {part} of {spec.name!r}, {problem.where}",
        found=problem.found,
        expected=problem.expected,
        fix="use --recipe published, or correct the plugin" if recommended else "correct the plugin",
    )


def _as_written(table: Mapping[str, Any]) -> dict[str, Any]:
    """As TOML would be read, options objects as tables."""
    plain: dict[str, Any] = as_toml({key: _tables(value) for key, value in table.items()})
    return plain


def _tables(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tables(entry) for key, entry in value.items()}
    return asdict(value) if has(type(value)) else value


def _options(
    options: type | None, table: Mapping[str, Any], registry: Registry
) -> tuple[dict[str, Any], list[DeepSpecError]]:
    """The values, and what is wrong with them. Keys that the options need and the recipe lacks are not."""
    known = [key for key in (() if options is None else keys_of(options)) if key != MASK]
    unknown = [key for key in table if key not in known]
    if unknown:
        return {}, explain(UnknownKeys(unknown, known), "options", siblings={})
    if options is None:
        return {}, []
    converter, every = strict_converter(registry), {attribute.name: attribute for attribute in fields(options)}
    mask = {MASK: 0} if MASK in every else {}
    try:
        built = converter.get_structure_hook(options)({**mask, **table}, options)
        return {key: getattr(built, key) for key in table}, []
    except Exception as error:
        left = {f"options.{key}" for key, attribute in every.items() if attribute.default is NOTHING} - {
            f"options.{key}" for key in table
        }
        told = explain(error, "options", siblings={})
        problems = [each for each in told if not (each.problem == MISSING and each.where in left)]
    if problems:
        return {}, problems
    types = {key: every[key].type for key in table}
    return {key: converter.get_structure_hook(types[key])(value, types[key]) for key, value in table.items()}, []


def _of_loss(table: Mapping[str, Any], registry: Registry) -> list[DeepSpecError]:
    """What is wrong with keys of [loss]."""
    loss, problems = _of_section("loss", table, LossOptions, registry)
    return problems if loss is None else list(loss_mistakes(loss))


def _of_section(
    name: str, table: Mapping[str, Any], options: type[_Options], registry: Registry
) -> tuple[_Options | None, list[DeepSpecError]]:
    """The section that these keys make, or what is wrong with them."""
    try:
        built: _Options = strict_converter(registry).get_structure_hook(options)(table, options)
    except Exception as error:
        return None, explain(error, name, siblings={})
    return built, []
