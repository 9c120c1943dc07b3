"""export.json, beside an export: what was written, by what, for which engines, and what was verified and how.

Knows files and versions; not formats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from deepspec_core.contracts.export import ExportFacts
from deepspec_export.verification import CONFIG, WEIGHTS

RECORD: Final = "export.json"
CARD: Final = "README.md"
# It may be a path.
_NOT_PORTABLE: Final = ("target_model_name_or_path",)
_PACKAGES: Final = ("deepspec-core", "deepspec-export")


def record(
    facts: ExportFacts, name: str, written_for: Mapping[str, str], out: Path, files: Sequence[str] = (CONFIG, WEIGHTS)
) -> dict[str, Any]:
    """The part that every format shares. `written_for`: the versions of packages whose rules were followed."""
    return {
        "format": name,
        "algorithm": facts.description.algorithm,
        "target": None if facts.target is None else {"name": facts.target.name, "local": facts.target.local},
        **({"untrained": True} if facts.untrained else {}),
        **({"draft_vocabulary": dict(facts.reduced)} if facts.reduced else {}),
        "written_by": {package: _version(package) for package in _PACKAGES},
        "written_for": dict(written_for),
        # What engines need not know, and an import of the export takes back.
        "checkpoint": {"model_type": facts.config["model_type"], **_training_keys(facts)},
        "sha256": {file: _digest(out / file) for file in files},
    }


def _training_keys(facts: ExportFacts) -> dict[str, Any]:
    return {name: value for name, value in facts.description.config.items() if name not in _NOT_PORTABLE}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As JSON that any reader takes: ValueError for a number that is none."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
