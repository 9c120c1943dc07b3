"""A folder of prepared conversations: one file a split, and a manifest that says what they were made from.

Knows the folder's format. Does not know sources, or how conversations are split (split.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from deepspec_core.data.conversations import Conversation
from deepspec_core.data.row_files import read_rows
from deepspec_core.data.source_row import SourceRow
from deepspec_core.data.split import Split
from deepspec_core.digests import digests_of
from deepspec_core.errors import DataError
from deepspec_core.json_files import read_object, value_of

MANIFEST: Final = "manifest.json"
FORMAT: Final = "deepspec-prepared"
VERSION: Final = 1
FILES: Final[Mapping[Split, str]] = {"train": "train.jsonl", "held_out": "held-out.jsonl"}
# Bytes at the beginning of a manifest that say what it is.
_BEGINNING: Final = 256
_AGAIN: Final = "Prepare it again: deepspec data prepare RUN.toml --force"


@frozen(kw_only=True)
class Manifest:
    """What a prepared folder says of itself. `split` has `rule`, `held_out` and `seed`; `digests` are by file name."""

    split: dict[str, Any]
    digests: dict[str, str]
    content: dict[str, Any]


def is_prepared(folder: Path) -> bool:
    """Whether the folder has a manifest of prepared conversations, be it damaged or not."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(_BEGINNING)


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a prepared folder. Raises DataError if it is of another version, or damaged."""
    path = folder / MANIFEST
    content = read_object(path, kind=DataError, fix=_AGAIN)
    if content.get("version") != VERSION:
        raise DataError(
            "A prepared folder is of another version",
            where=path,
            found=content.get("version"),
            expected=VERSION,
            fix=_AGAIN,
        )
    split = value_of(content, "split", dict, path=path, kind=DataError, absent={})
    files = value_of(content, "files", dict, path=path, kind=DataError, absent={})
    digests = {name: str(file.get("digest")) for name, file in files.items() if isinstance(file, dict)}
    if not {"rule", "held_out", "seed"} <= split.keys() or not set(FILES.values()) <= digests.keys():
        raise DataError("A prepared folder's manifest is damaged", where=path, fix=_AGAIN)
    return Manifest(split=split, digests=digests, content=content)


def check_prepared(folder: Path) -> None:
    """Raise DataError if a file of a prepared folder is missing, or not as it was written."""
    digests = manifest_of(folder).digests
    for name in FILES.values():
        path = folder / name
        now = digests_of([path])[0] if path.is_file() else None
        if now != digests[name]:
            raise DataError(
                "A prepared folder has changed since it was written",
                where=path,
                found="no such file" if now is None else f"digest {now}",
                expected=f"digest {digests[name]}, as {MANIFEST} says",
                fix=_AGAIN,
            )


def prepared_rows(folder: Path, split: Split) -> Iterator[SourceRow]:
    """The rows of one split. Raises DataError if the folder is not as it was written."""
    check_prepared(folder)
    yield from read_rows(folder / FILES[split], most_bytes=None)


def line_of(conversation: Conversation) -> bytes:
    """The conversation as a JSON line from which it is read again as it is."""
    row: dict[str, Any] = {"id": conversation.id, "messages": conversation.messages}
    if conversation.tools:
        row["tools"] = conversation.tools
    if conversation.input_ids is not None:
        row |= {"input_ids": conversation.input_ids, "loss_mask": conversation.loss_mask}
    if conversation.rewritten:
        row["rewritten"] = conversation.rewritten
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair can be written as an escape only
        return json.dumps(row).encode() + b"\n"


def _content(folder: Path) -> dict[str, Any]:
    return read_object(folder / MANIFEST, kind=DataError)
