"""Options that differ from given ones in one value each. Knows attrs classes; does not know what reads the options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import attrs


def changed_options(options: Any) -> Iterator[tuple[str, list[Any]]]:
    """Each option's name, such as "head.rank", with the options in which it alone has another value.

    There are several for one option, the nearest first, because a draft may refuse some. Those that the class refuses
    are left out, as are options that are neither numbers nor one of a list of words.
    """
    # Annotations may still be text.
    for attribute in attrs.fields(attrs.resolve_types(type(options))):
        value = getattr(options, attribute.name)
        if attrs.has(type(value)):
            for name, inner in changed_options(value):
                yield f"{attribute.name}.{name}", _accepted(options, attribute, inner)
        else:
            yield attribute.name, _accepted(options, attribute, _others(value, attribute.type))


def _others(value: Any, kind: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2 * value, value // 2]
    if isinstance(value, float):
        return [value / 2, value + 0.25, value * 2]
    if value is None and int in get_args(kind):
        return [16, 4, 1]
    if value is None and float in get_args(kind):
        return [0.5, 2.0]
    words = [word for word in get_args(kind) if isinstance(word, str)] if isinstance(value, str) else []
    return [word for word in words if word != value]


def _accepted(options: Any, attribute: Any, values: Sequence[Any]) -> list[Any]:
    made = []
    for value in values:
        try:
            made.append(attrs.evolve(options, **{attribute.alias: value}))
        except (ValueError, TypeError):
            continue
    return made
