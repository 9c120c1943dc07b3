"""The digest of a source of conversations. It covers the contents, so an edited source has another digest.

Knows files, dataset folders and commits of the Hub; does not know the contents of a source.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from deepspec_core.config.schema import BUILTIN, SourceOptions
from deepspec_core.data.source_rows import hub_commit, on_hub
from deepspec_core.digests import digests_of


def source_digest(source: SourceOptions, *, base: Path, ask_hub: bool) -> str | None:
    """The digest of a file, of all files in a dataset folder, or the commit of a dataset on the Hub.

    None where there is nothing to hash: prompts that a plugin ships come from its code, and the Hub is asked only if
    `ask_hub`. Raises DataError if the Hub does not give the dataset, and OSError if a file cannot be read.
    """
    if source.path.startswith(BUILTIN):
        return None
    if on_hub(source, base):
        return hub_commit(source, base) if ask_hub else None
    path = base / source.path
    if not path.is_dir():
        return file_digest(path)
    # Through links too: whoever reads the folder follows them.
    found = (Path(folder) / name for folder, _, names in os.walk(path, followlinks=True) for name in names)
    digest, files = hashlib.sha256(), sorted(entry for entry in found if entry.is_file())
    for file, content in zip(files, digests_of(files), strict=True):
        digest.update(f"{file.relative_to(path)} {content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The digest of every byte of a file."""
    return digests_of([path])[0]
