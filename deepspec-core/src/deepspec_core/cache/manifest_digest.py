"""The digest of a cache's manifest over its own contents: header, ids, lengths and the shards' checksums.

It ties the manifest to its shards, and detects a manifest that was edited or damaged. It is no signature: anyone who
edits a file can compute a new digest. Knows JSON objects; does not know what they mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deepspec_core.errors import CacheError

__all__ = ["reseal", "sealed"]

KEY: Final = "digest"
CANNOT_BE_CHECKED: Final = (
    "the manifest has no digest, as those of earlier versions: what it says of samples and target cannot be checked"
)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a manifest with its digest. One that it had is replaced."""
    return {**_others(content), KEY: _digest(content)}


def reseal(path: Path) -> None:
    """Give a manifest that was edited on purpose, as tests do, the digest of what it now says."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(sealed(content)), encoding="utf-8")


def has_digest(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether a manifest has a digest; manifests of earlier versions have none. CacheError where it does not fit."""
    if KEY not in content:
        return False
    expected, found = content[KEY], _digest(content)
    if found != expected:
        raise CacheError(
            "The cache's manifest has changed since it was written",
            where=path,
            found=f"contents with the digest {found}",
            expected=f"the digest stored in it, {json.dumps(expected)[:80]}",
            fix="Restore the file, or make the cache again (--force cache).",
        )
    return True


def _others(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != KEY}


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the other keys as JSON, keys sorted, no spaces, ASCII: the same however the file was laid out."""
    canonical = json.dumps(_others(content), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
