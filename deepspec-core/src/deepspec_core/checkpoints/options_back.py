"""Whether a draft's config.json gives back the options that the draft was trained with.

Knows options classes only. Does not know files, runs or algorithms.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import attr
import attrs


def lost_option(trained: Any, given_back: Any, unread: Collection[str] = ()) -> str | None:
    """The first option with another value than in training, in words; None if all came back.

    `unread` are `DraftDescription.unread_options`. None in training means that the draft chose the value, and then
    any value may come back.
    """
    if trained is None:
        return None
    if not attrs.has(type(given_back)):
        return f"`options_of` gives no options, but {type(given_back).__name__}"
    back = dict(_flat(attr.asdict(given_back, retain_collection_types=False)))
    for name, value in _flat(attr.asdict(trained, retain_collection_types=False)):
        if name in unread or value is None:
            continue
        if name not in back:
            return f"no option {name}, where training has {value!r}"
        if back[name] != value:
            return f"{name} = {back[name]!r}, where training has {value!r}"
    return None


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value
