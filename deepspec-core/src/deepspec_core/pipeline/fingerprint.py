"""What a stage was made from, so that a rerun can tell done from changed.

A fingerprint is the values of just those keys of the run file that the stage read, and the digests of what else it read
(reads.py). It is kept as text beside the stage's results (stage.json), so that a difference can be named. Knows keys
and values; not what stages do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen
from attrs.validators import instance_of

from deepspec_core.config.load import RunFile
from deepspec_core.config.schema import KNOWN_STAGES
from deepspec_core.errors import StageError

RECORD = "stage.json"


def flatten(run_file: RunFile) -> dict[str, Any]:
    """Every key of a run file as written there, dotted, with its effective value in JSON types."""
    flat: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if attrs.has(type(value)):
            for attribute in attrs.fields(type(value)):
                # A plugin's options stand in the section itself: [draft] block_size, not [draft.options] block_size.
                inner = path if attribute.name == "options" else f"{path}.{attribute.name}".lstrip(".")
                visit(inner, getattr(value, attribute.name))
        elif isinstance(value, Mapping):
            for name, entry in value.items():
                visit(f"{path}.{name}", entry)
        elif value is not None or path:
            flat[path] = json.loads(json.dumps(value, default=_plain))

    visit("", run_file)
    # Each stage by itself, for what depends on whether the run has it (Run.has).
    flat |= {f"run.stages.{stage}": stage in run_file.run.stages for stage in KNOWN_STAGES}
    return flat


def _plain(value: Any) -> Any:
    if attrs.has(type(value)):
        return attrs.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def fingerprint(flat: Mapping[str, Any], reads: Sequence[str]) -> dict[str, Any]:
    """The part of a flattened run file a stage reads; `reads` are keys or sections."""
    return {
        key: value for key, value in flat.items() if any(key == name or key.startswith(f"{name}.") for name in reads)
    }


@frozen(kw_only=True)
class StageRecord:
    """What stands beside a stage's results.

    `reads` are names of keys and sections, `keys` all keys under these names with their values, `content` what was read
    beside the run file.
    """

    stage: str = field(validator=instance_of(str))
    keys: dict[str, Any] = field(validator=instance_of(dict))
    complete: bool = field(validator=instance_of(bool))
    seconds: float = field(validator=instance_of((int, float)))
    plugins: dict[str, str] = field(validator=instance_of(dict))
    summary: dict[str, Any] = field(validator=instance_of(dict))
    reads: list[str] = field(factory=list, validator=instance_of(list))
    content: dict[str, str] = field(factory=dict, validator=instance_of(dict))

    @property
    def names_read(self) -> list[str]:
        """`reads`; a record from before these were kept names single keys only."""
        return self.reads or list(self.keys)

    def write(self, folder: Path) -> None:
        """Write atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{RECORD}.partial"
        temporary.write_text(json.dumps(attrs.asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / RECORD)


def read_record(folder: Path) -> StageRecord | None:
    """The record of a stage's folder, None where the stage never started. StageError where the file is damaged."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return StageRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise StageError(
            "A stage's record is damaged",
            where=path,
            found=str(error),
            fix=f"Run again with --force {folder.name}, or choose another output.",
        ) from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every key that differs; a key only one side has counts with None."""
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
