"""JSON files that carry their format, their version, and a digest by which edits are noticed.

The object has the keys `format` and `version`, then its content, then `digest`, which covers all other keys. An edit
that leaves the digest unchanged is noticed. The digest protects against accidents, not against forgery. This file knows
files. It does not know what their content means.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec_core.errors import DeepSpecError
from deepspec_core.json_files import read_object

_OWN = ("format", "version", "digest")


def write_sealed(path: Path, content: Mapping[str, Any], *, form: str, version: int) -> None:
    """Write the file, which appears only when all of it is written. `content` has plain JSON types, finite numbers."""
    whole: dict[str, Any] = {"format": form, "version": version, **content}
    write_json(path, {**whole, "digest": content_digest(whole)})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object. The file appears only when all of it is written.

    If several processes write the same file, one of their files stays, and it is complete.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_sealed(
    path: Path, *, form: str, version: int, what: str, kind: type[DeepSpecError], fix: str
) -> dict[str, Any]:
    """The content of the file. Raises `kind` if the file is missing, edited, or of another format or version.

    `what` names the file in messages, as in "the calibration".
    """
    try:
        whole = read_object(path, kind=kind, fix=fix)
    except FileNotFoundError:
        raise kind(f"{what} is missing", where=path, fix=fix) from None
    found = (whole.get("format"), whole.get("version"))
    if found != (form, version):
        raise kind(
            f"{what} is of another kind",
            where=path,
            found=f"format {found[0]!r}, version {found[1]!r}"[:80],
            expected=f"format {form!r}, version {version}",
            fix=fix,
        )
    digest = whole.pop("digest", None)
    if digest != content_digest(whole):
        raise kind(
            f"{what} was edited",
            where=path,
            found=f"digest {str(digest)[:16]}",
            expected=f"{content_digest(whole)[:16]}, the digest of what it says",
            fix=fix,
        )
    return {key: value for key, value in whole.items() if key not in _OWN}


def content_digest(content: Mapping[str, Any]) -> str:
    """The digest of plain JSON types. It does not depend on the order of the keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
