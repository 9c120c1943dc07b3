"""Tables to options, strictly: a cattrs converter that coerces nothing and collects every error with its path.

"8" is not 8, 3.7 is not 3 and true is not 1; a whole number is fine where a number is expected, and one number where a
list of numbers is. Names of components are checked against the registry, and the sections that a plugin shapes get its
options. Errors leave here as cattrs raises them; explain.py puts them into words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from attrs import Attribute, fields, has, resolve_types
from cattrs import ClassValidationError, Converter, IterableValidationError, IterableValidationNote
from cattrs.errors import AttributeValidationNote
from cattrs.gen import make_dict_structure_fn, override

from deepspec_core.config.explain import Mismatch, UnknownKeys, is_union, keys_of, of_validator, words
from deepspec_core.config.schema import (
    BUILTIN,
    ROW_FILES,
    CacheOptions,
    DraftOptions,
    EvaluateOptions,
    ExportOptions,
    FeaturesOptions,
    LossOptions,
    SourceOptions,
    TargetOptions,
    TermOptions,
    WeightingOptions,
)
from deepspec_core.errors import DeepSpecError, PluginError
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.coefficient_schedule import CoefficientSchedule

HELD_OUT = "held-out"

Hook = Callable[[Any, Any], Any]
Check = Callable[[int | str, Any], None]

_NAMES: Mapping[tuple[type, str], str] = {
    (FeaturesOptions, "mode"): "features",
    (CacheOptions, "format"): "cache",
    (LossOptions, "terms"): "loss",
    (EvaluateOptions, "tasks"): "task",
    (ExportOptions, "to"): "exporter",
}
_BUILTINS: Mapping[tuple[type, str], str] = {(TargetOptions, "model"): "model", (SourceOptions, "path"): "prompts"}
_LISTS: tuple[object, ...] = (tuple, list, set, frozenset, Sequence, AbstractSet)


def strict_converter(registry: Registry) -> Converter:
    """A converter whose `structure(table, SectionClass)` checks types, validators and component names."""
    converter = Converter(detailed_validation=True, forbid_extra_keys=True)
    for type_ in (bool, int, float, str):
        converter.register_structure_hook(type_, _scalar)
    converter.register_structure_hook(Path, _path)
    converter.register_structure_hook_func(_is_literal, _literal)
    converter.register_structure_hook_factory(is_union, _union_hook)
    converter.register_structure_hook_factory(_is_list, lambda type_, c: _list_hook(type_, c))
    converter.register_structure_hook_factory(_is_mapping, lambda type_, c: _table_hook(type_, c))
    converter.register_structure_hook_factory(has, lambda section, c: _section_hook(section, c, registry))
    for section, kind in ((DraftOptions, "draft"), (WeightingOptions, "weighting")):
        converter.register_structure_hook(section, _typed_section_hook(section, kind, converter, registry))
    return converter


def _scalar(value: Any, type_: Any) -> Any:
    if type_ is float and type(value) is int:
        return float(value)
    if type(value) is not type_:
        raise Mismatch(value, words(type_))
    if type_ is float and not math.isfinite(value):
        raise Mismatch(value, "a finite number")
    return value


def _path(value: Any, type_: Any) -> Path:
    if not isinstance(value, str):
        raise Mismatch(value, words(type_))
    return Path(value)


def _literal(value: Any, type_: Any) -> Any:
    for option in get_args(type_):
        if type(value) is type(option) and value == option:
            return value
    raise Mismatch(value, words(type_), [option for option in get_args(type_) if isinstance(option, str)])


def _union_hook(type_: Any, converter: Converter) -> Hook:
    members = [member for member in get_args(type_) if member is not type(None)]

    def structure(value: Any, _: Any) -> Any:
        errors: list[Exception] = []
        for member in members:
            try:
                return converter.get_structure_hook(member)(value, member)
            except Exception as error:
                errors.append(error)
        # The one member there is, or the one that at least got past the kind of value, knows best what is wrong.
        kinds = map(words, members)
        inside = [error for error, kind in zip(errors, kinds, strict=True) if getattr(error, "expected", None) != kind]
        if len(errors) == 1 or len(inside) == 1:
            raise (inside or errors)[0]
        raise Mismatch(value, words(type_))

    return structure


def _each(items: Iterable[tuple[int | str, Any, Any, Hook]], container: Any, check: Check) -> list[Any]:
    """Structure and check (index or key, value, type, hook) one by one, and raise everything that failed at the end."""
    done, errors = [], []
    for index, value, type_, hook in items:
        try:
            item = hook(value, type_)
            check(index, item)
            done.append(item)
        except Exception as error:
            error.add_note(IterableValidationNote(f"@ {index}", index, type_))
            errors.append(error)
    if errors:
        raise IterableValidationError("", errors, container)
    return done


def _unchecked(_index: int | str, _item: Any) -> None:
    return


def _list_hook(type_: Any, converter: Converter, check: Check = _unchecked) -> Hook:
    origin, arguments = get_origin(type_), get_args(type_)
    fixed = origin is tuple and Ellipsis not in arguments
    build = {Sequence: tuple, AbstractSet: frozenset}.get(origin, origin)

    def structure(value: Any, _: Any) -> Any:
        if arguments == (float, Ellipsis) and type(value) in (int, float):
            value = [value]
        if not isinstance(value, list) or (fixed and len(value) != len(arguments)):
            raise Mismatch(value, words(type_))
        types = arguments if fixed else arguments[:1] * len(value)
        hooks = map(converter.get_structure_hook, types)
        return build(_each(zip(range(len(value)), value, types, hooks, strict=True), type_, check))

    return structure


def _is_literal(type_: Any) -> bool:
    origin: object = get_origin(type_)
    return origin is Literal


def _is_list(type_: Any) -> bool:
    origin: object = get_origin(type_)
    return origin in _LISTS


def _is_mapping(type_: Any) -> bool:
    origin = get_origin(type_)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _table_hook(
    type_: Any, converter: Converter, check: Check = _unchecked, hook_of: Callable[[str], Hook] | None = None
) -> Hook:
    """`hook_of` gives the hook of a key; left out, the type of the values decides."""
    item = get_args(type_)[1]

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise Mismatch(value, words(type_))
        of = hook_of or (lambda _key: converter.get_structure_hook(item))
        return dict(zip(value, _each(((key, value[key], item, of(key)) for key in value), type_, check), strict=True))

    return structure


def _section_hook(section: type[Any], converter: Converter, registry: Registry) -> Hook:
    """cattrs' own function for an attrs class, with each value validated and each name looked up where it stands."""
    resolve_types(section)
    overrides = {
        attribute.name: override(struct_hook=_value_hook(section, attribute, converter, registry))
        for attribute in fields(section)
    }
    structure_table = make_dict_structure_fn(section, converter, **overrides)  # type: ignore[arg-type]

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise Mismatch(value, words(section))
        return structure_table(value, section)

    return structure


def _value_hook(section: type[Any], attribute: Attribute[Any], converter: Converter, registry: Registry) -> Hook:
    """One key: its type, its validator, its name; of lists and tables item by item, so that none hides the next."""
    key, type_ = (section, attribute.name), attribute.type
    validator = attribute.validator if attribute.converter is None else None
    members = getattr(validator, "member_validator", None)
    values = getattr(attribute.validator, "value_validator", None)

    def check_item(_index: int | str, item: Any) -> None:
        if members is not None:
            _validate(members, attribute, get_args(type_)[0], item)
        _check_name(registry, key, item)

    def check_key(name: int | str, item: Any) -> None:
        _check_name(registry, key, name)
        if values is not None:
            _validate(values, attribute, type(item), item)

    hook: Hook
    if _is_list(type_):
        hook, whole = _list_hook(type_, converter, check_item), False
    elif key == (LossOptions, "terms"):
        hook, whole = _table_hook(type_, converter, check_key, partial(_term_hook, converter, registry)), False
    elif _is_mapping(type_):
        hook, whole = _table_hook(type_, converter, check_key), False
    else:
        hook, whole = converter.get_structure_hook(type_), True

    def structure(value: Any, _: Any) -> Any:
        done = hook(value, type_)
        if validator is not None:
            _validate(validator, attribute, type(done) if is_union(type_) else type_, done)
        if whole:
            _check_name(registry, key, done)
        return done

    return structure


def _validate(validator: Any, attribute: Attribute[Any], type_: Any, value: Any) -> None:
    """Run a validator before its section is built, so that one bad value does not hide the next.

    attrs calls it again when it builds the section; a validator that looks at other keys of its section waits for that.
    """
    try:
        validator(None, attribute, value)
    except AttributeError:
        return
    except (ValueError, TypeError) as error:
        raise of_validator(error, attribute, type_, value) from error


def _check_name(registry: Registry, key: tuple[type, str], name: Any) -> None:
    """PluginError where the key takes names of components and this one cannot be used."""
    kind = _NAMES.get(key)
    if kind == "exporter" and (algorithms := registry.algorithms("exporter", name)):
        registry.get(kind, name, algorithm=algorithms[0])  # checks.py knows which algorithm it is to be
    elif kind is not None and not (kind == "task" and (name == HELD_OUT or name.endswith(ROW_FILES))):
        registry.get(kind, name)
    if key in _BUILTINS and name.startswith(BUILTIN):
        spec = registry.get("builtin", name.removeprefix(BUILTIN))
        if spec.kind != _BUILTINS[key]:
            raise PluginError(f"{name} is a builtin of the wrong kind", found=spec.kind, expected=_BUILTINS[key])


def _component_options(
    name: str, options: type | None, table: dict[str, Any], own: Sequence[str], converter: Converter
) -> Any:
    """The options of a component of that name, from the keys that stand beside core's `own`; None if it has none.

    ClassValidationError holds everything that is wrong with them.
    """
    if options is None:
        if table:
            raise ClassValidationError("", [UnknownKeys(table, own)], dict)
        return None
    try:
        return converter.get_structure_hook(options)(table, options)
    except ClassValidationError as group:
        extra = set(table) - set(keys_of(options))
        errors = [error for error in group.exceptions if not hasattr(error, "extra_fields")]
        if extra:
            errors.append(UnknownKeys(extra, [*own, *keys_of(options)]))
        raise ClassValidationError("", errors, options) from group


def _term_hook(converter: Converter, registry: Registry, name: str) -> Hook:
    """An entry of [loss] terms. The options of its term stand beside `coefficient`, or beside a schedule's keys."""
    coefficient: Any = float | CoefficientSchedule
    structure_coefficient = converter.get_structure_hook(coefficient)
    structure_own, schedule = _section_hook(TermOptions, converter, registry), keys_of(CoefficientSchedule)
    try:
        options_class = registry.get("loss", name).options
    except PluginError:  # told where the name is checked
        options_class = None

    def structure(value: Any, _: Any) -> Any:
        table = value if isinstance(value, dict) else {}
        if options_class is None and "coefficient" not in table:
            return structure_coefficient(value, coefficient)
        flat = table is not value or ("coefficient" not in table and not table.keys().isdisjoint(schedule))
        own = [*schedule] if flat and table is value else ["coefficient"]
        given, rest = ({key: table[key] for key in table if (key in own) is there} for there in (True, False))
        errors, options, term = list[Exception](), None, None
        try:
            options = _component_options(name, options_class, rest, own, converter)
        except ClassValidationError as group:
            errors += group.exceptions
        try:
            if flat:
                done = structure_coefficient(given if table is value else value, coefficient)
                term = TermOptions(coefficient=done, options=options)
            else:
                term = structure_own({**given, "options": options}, TermOptions)
        except ClassValidationError as group:
            errors += group.exceptions
        if errors:
            raise ClassValidationError("", errors, TermOptions)
        return term if options_class is not None or term is None else term.coefficient

    return structure


def _typed_section_hook(section: type[Any], kind: str, converter: Converter, registry: Registry) -> Hook:
    """A section whose `type` names a component and whose keys, but for core's own, are that component's options."""
    own = keys_of(section)
    structure_own = _section_hook(section, converter, registry)
    default = fields(section).type.default

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise Mismatch(value, words(section))
        name, errors, options = value.get("type", default), list[Exception](), None
        try:
            if isinstance(name, str):
                table = {key: value[key] for key in value if key not in own}
                options = _component_options(name, registry.get(kind, name).options, table, own, converter)
        except ClassValidationError as group:
            errors += group.exceptions
        except DeepSpecError as error:
            error.add_note(AttributeValidationNote("@ type", "type", str))
            errors.append(error)
        try:
            built = structure_own({**{key: value[key] for key in value if key in own}, "options": options}, section)
        except ClassValidationError as group:
            errors += group.exceptions
        if errors:
            raise ClassValidationError("", errors, section)
        return built

    return structure
