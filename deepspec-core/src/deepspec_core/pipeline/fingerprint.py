"""The inputs of a stage's results, recorded so that a rerun can tell whether they have changed.

A fingerprint holds the values of the run file's keys that the stage read, and the digests of the other content that it
read (reads.py). It is stored as text beside the stage's results (stage.json), so that a message can name a difference.
Knows keys and values. Does not know what stages do.
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
from deepspec_core.config.schema import KNOWN_STAGES, READ_ALONE, changes_results
from deepspec_core.disk import refuse_folder
from deepspec_core.errors import StageError

RECORD = "stage.json"


def flatten(run_file: RunFile) -> dict[str, Any]:
    """Every key of a run file, dotted as in errors, with its effective value in JSON types.

    Reading a table inside a section counts as reading all of it, so its keys that change no result are left out.
    """
    flat: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if attrs.has(type(value)):
            for attribute in attrs.fields(type(value)):
                if "." in path and not changes_results(attribute):
                    continue
                # A plugin's options stand in the section itself: [draft] block_size, not [draft.options] block_size.
                inner = path if attribute.name == "options" else f"{path}.{attribute.name}".lstrip(".")
                visit(inner, getattr(value, attribute.name))
        elif isinstance(value, Mapping):
            for name, entry in value.items():
                visit(f"{path}.{name}", entry)
        elif value is not None or path:
            flat[path] = json.loads(json.dumps(value, default=_plain))

    visit("", run_file)
    # Each stage is a key by itself, because a stage may depend on whether the run has another one (Run.has).
    flat |= {f"run.stages.{stage}": stage in run_file.run.stages for stage in KNOWN_STAGES}
    return flat


def schema_keys(run_file: RunFile) -> dict[str, tuple[Any, Any]]:
    """The keys that core's sections have in this version, with their values and defaults. Keys that change no results,
    and those without a default, are left out, as are those that a plugin or the user names.
    """
    keys: dict[str, tuple[Any, Any]] = {}
    for section in attrs.fields(RunFile):
        options = getattr(run_file, section.name)
        for attribute in attrs.fields(type(options)) if attrs.has(type(options)) else ():
            value, default = getattr(options, attribute.name), attribute.default
            if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
                default = default.factory() if not default.takes_self else attrs.NOTHING
            if default is not attrs.NOTHING and changes_results(attribute) and attribute.name != "options":
                keys[f"{section.name}.{attribute.name}"] = (value, default)
    return keys


def added_since(run_file: RunFile, record: StageRecord) -> list[tuple[str, Any, Any]]:
    """(key, default, value) of every key that is not at its default, and that no results of `record` can know: the
    version that made them did not have it.

    An older record does not say which keys there were. Of its own section, keys that it did not read then count.
    """

    def unknown(key: str) -> bool:
        if record.known:
            return key not in record.known
        return key.startswith(f"{record.stage}.") and not any(_covers(name, key) for name in record.names_read)

    added = [(key, *both) for key, both in sorted(schema_keys(run_file).items()) if unknown(key)]
    return [(key, default, value) for key, value, default in added if value != default]


def _plain(value: Any) -> Any:
    if attrs.has(type(value)):
        # An empty table says what an older record without that key says.
        return attrs.asdict(value, filter=lambda _, inner: inner != {})
    raise TypeError(f"{type(value).__name__} has no JSON form")


def fingerprint(flat: Mapping[str, Any], reads: Sequence[str]) -> dict[str, Any]:
    """The part of a flattened run file that a stage reads. `reads` names keys or sections."""
    return {key: value for key, value in flat.items() if any(_covers(name, key) for name in reads)}


def _covers(name: str, key: str) -> bool:
    """Whether reading what `name` names, a key or a section, is reading this key."""
    if not _within(key, name):
        return False
    return not any(_within(key, own) and own != name and _within(own, name) for own in READ_ALONE)


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


@frozen(kw_only=True)
class StageRecord:
    """The record beside a stage's results.

    reads: The names of the keys and sections that the stage read.
    keys: All keys under these names, with their values.
    content: The digests of the other content that the stage read.
    made: The digests of what a finished stage left for later ones.
    plugins: The installed versions. Where a stage was resumed with another one, both stand there.
    known: The keys that run files could have. Later versions have more, which these results do not follow. Older
        records do not say them.
    """

    stage: str = field(validator=instance_of(str))
    keys: dict[str, Any] = field(validator=instance_of(dict))
    complete: bool = field(validator=instance_of(bool))
    seconds: float = field(validator=instance_of((int, float)))
    plugins: dict[str, str] = field(validator=instance_of(dict))
    summary: dict[str, Any] = field(validator=instance_of(dict))
    reads: list[str] = field(factory=list, validator=instance_of(list))
    content: dict[str, str] = field(factory=dict, validator=instance_of(dict))
    made: dict[str, str] = field(factory=dict, validator=instance_of(dict))
    known: list[str] = field(factory=list, validator=instance_of(list))

    @property
    def names_read(self) -> list[str]:
        """`reads`. An older record without them names single keys only."""
        return self.reads or list(self.keys)

    def write(self, folder: Path) -> None:
        """Write atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{RECORD}.partial"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(attrs.asdict(self), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / RECORD)


def read_record(folder: Path) -> StageRecord | None:
    """The record of a stage's folder; None if the stage never started.

    Raises StageError for a damaged file or a folder.
    """
    path = folder / RECORD
    refuse_folder(path)
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
    """(key, old value, new value) of every key that differs. The value of a key that one side lacks is None."""
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
