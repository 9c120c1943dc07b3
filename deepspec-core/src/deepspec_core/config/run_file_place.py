"""Where the run file lay whose results a folder holds: relative paths of the saved one start there.

Knows paths as text, and follows links. Does not read run files.
"""

from __future__ import annotations

import os
from pathlib import Path


def run_file_folder(folder: Path, output: str) -> Path | None:
    """The folder of the run file, from the folder of its results and its `run.output`, which goes down from it there.

    None where that does not say: an absolute `output`, one that goes up, and a folder that was renamed or moved alone.
    """
    parts, here = Path(os.path.normpath(output)).parts, folder.resolve().parts
    base = here[: len(here) - len(parts)]
    if os.path.isabs(output) or ".." in parts or (*base, *parts) != here:
        return None
    return Path(*base)
