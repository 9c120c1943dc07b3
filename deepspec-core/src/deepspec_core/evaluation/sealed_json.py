"""JSON files that say what they are, of which version, and whether somebody edited them.

The object has the keys `format` and `version`, then its content, then `digest`, which is a digest of all the rest. An
edit that leaves the digest as it was is noticed. It tells accidents apart, not forgeries. Knows files; not what their
content means.
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
    """Write the file; it appears when all of it is written. `content` has plain JSON types with finite numbers."""
    whole: dict[str, Any] = {"format": form, "version": version, **content}
    write_json(path, {**whole, "digest": content_digest(whole)})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object; the file appears when all of it is written. Of several writers one file stays, whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_sealed(
    path: Path, *, form: str, version: int, what: str, kind: type[DeepSpecError], fix: str
) -> dict[str, Any]:
    """The content of the file. `kind` of error if it is missing, of another format or version, or edited.

    `what` names such a file in messages, as in "the calibration".
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
    """The digest of plain JSON types, in whatever order the keys stand."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
