"""Paths that no file system takes. Knows texts; looks at no disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from deepspec_core.errors import ConfigError

_LONGEST_NAME: Final = 255
# A path has 4,096 bytes at most; the files of a run below it need some.
_LONGEST_PATH: Final = 3_800


def no_path(where: str, path: str | os.PathLike[str], *, base: Path = Path(), beside: int = 0) -> ConfigError | None:
    """What is wrong with a path, relative to `base`, that cannot be; None for one that can. `where` is its key.

    `beside`: how many bytes more the name of an unfinished file or folder beside it has.
    """
    reason = _why_not(path, base, _LONGEST_NAME - beside)
    if reason is None:
        return None
    return ConfigError(
        "no file or folder can have this path",
        where=where,
        found=f"{str(path)[:80]!r}, {reason}",
        expected=f"names of at most {_LONGEST_NAME - beside} bytes",
    )


def _why_not(path: str | os.PathLike[str], base: Path, most: int) -> str | None:
    try:
        encoded = os.fsencode((base / path).absolute())
    except UnicodeError:
        return "not valid Unicode"
    if b"\0" in encoded:
        return "with a null byte"
    if len(encoded) > _LONGEST_PATH:
        return f"{len(encoded):,} bytes long"
    longest = max(map(len, encoded.split(b"/")))
    return f"with a name of {longest:,} bytes" if longest > most else None
