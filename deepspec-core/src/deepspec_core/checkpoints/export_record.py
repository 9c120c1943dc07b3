"""Whether a folder is an export for an engine, and no checkpoint: exports of deepspec-export have a file that says so.

Knows one key of export.json. Does not know what is in an export.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from deepspec_core.errors import CheckpointError
from deepspec_core.json_files import read_object

NAME: Final = "export.json"
_PUBLISHED: Final = "deepspec"


def why_no_checkpoint(directory: Path) -> CheckpointError | None:
    """The error that says which format the folder is an export in; None if it is none, or is a checkpoint too."""
    found = None
    with suppress(CheckpointError, OSError):
        found = read_object(directory / NAME, kind=CheckpointError).get("format")
    if not isinstance(found, str) or found == _PUBLISHED:
        return None
    return CheckpointError(
        f"this folder is an export in the format {found}, and no checkpoint",
        where=directory,
        found=f"format = {found}, in {NAME}",
        expected="the run or the checkpoint that the export was made of",
        fix="Name that one, or convert the export back with `deepspec import` of deepspec-export.",
    )
