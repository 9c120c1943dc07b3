"""What an exporter is told of a draft: from the draft itself, and from the run that made it.

Knows how a target is named without a path of this machine, and which part of a run file belongs into a model card.
Does not know formats, or where a run's files lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from deepspec_core.checkpoints.published import config_text, published_name
from deepspec_core.config.load import RunFile
from deepspec_core.config.schema import BUILTIN, FILLED_IN, changes_results
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import ExportFacts, TargetName
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.disk import is_folder
from deepspec_core.targets.opening import HUB_ID

SECTIONS: Final = ("data", "regenerate", "draft", "loss", "train")
"""The sections of a run file that say how a draft came about."""
# Servers are named by address; a prompt may begin as a path does.
_LEFT_OUT: Final = ("servers", "served_as", "api_key_env", "tree")
_TEXT: Final = "system_prompt"
_PATH_BEGINS: Final = ("/", "~", "./", "../")


def facts_of(
    draft: DraftModel,
    adapter: TargetAdapter,
    *,
    target: TargetName | None,
    dtype: str | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    tokenizer: Callable[[], Any] | None = None,
    reduced: Mapping[str, Any] | None = None,
    untrained: bool = False,
) -> ExportFacts:
    """The facts of a draft, with or without memory for its weights. `dtype`: of the stored weights, if not the draft's.

    `settings`: as settings_of gives them.
    """
    description = draft.describe()
    config = json.loads(config_text(draft, description, adapter))
    return ExportFacts(
        description=description,
        config=config if dtype is None else config | {"dtype": dtype},
        shapes={
            published_name(name, description.weight_names): tuple(tensor.shape)
            for name, tensor in draft.state_dict().items()
        },
        softcap=adapter.architecture.draft_softcap,
        target=target,
        settings=settings or {},
        results=results,
        tokenizer=tokenizer,
        reduced=reduced or {},
        untrained=untrained,
    )


def target_name(name: str, *, base: Path) -> TargetName:
    """What a target is called in exports. `name` is as a run file gives it, or a directory relative to `base`."""
    if name.startswith(BUILTIN):
        return TargetName(name=name)
    if is_folder(base / Path(name).expanduser()) or name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        return TargetName(name=Path(name).expanduser().resolve().name or "target", local=True)
    return TargetName(name=name)


def settings_of(file: RunFile | Mapping[str, Any]) -> dict[str, Any]:
    """The sections that say how a draft came about, in JSON types, without paths of this machine.

    Of a run file, or of the tables of one that was saved. Keys that change no result are left out of the former.
    """
    if isinstance(file, Mapping):
        return {name: _portable(file[name]) for name in SECTIONS if name in file}
    sections = {name: _keys(getattr(file, name)) for name in SECTIONS}
    return {name: _portable(keys) for name, keys in sections.items()}


def _keys(section: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in attrs.fields(section.__class__):
        if changes_results(attribute) and attribute.name not in _LEFT_OUT:
            value = _plain(getattr(section, attribute.name))
            # A plugin's options stand in the section itself: [draft] block_size, not [draft.options] block_size.
            found |= (value or {}) if attribute.metadata == FILLED_IN else {attribute.name: value}
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if attrs.has(type(value)):
        return _keys(value)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _portable(value: Any, key: str = "") -> Any:
    """A section without what is of this machine alone: a local path is cut to its last part."""
    if isinstance(value, Mapping):
        return {name: _portable(inner, name) for name, inner in value.items() if name not in _LEFT_OUT}
    if isinstance(value, list | tuple):
        return [_portable(inner, key) for inner in value]
    if isinstance(value, str) and key != _TEXT and value.startswith(_PATH_BEGINS):
        return Path(value).name
    return value
