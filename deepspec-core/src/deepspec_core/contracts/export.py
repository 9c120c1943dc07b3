"""What an exporter does: write a trained draft as a serving engine loads it, or refuse and say why."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from deepspec_core.contracts.draft import DraftDescription, DraftModel

__all__ = ["Exporter"]


@runtime_checkable
class Exporter(Protocol):
    """One (format, algorithm) pair."""

    def unservable(self, description: DraftDescription) -> str | None:
        """Why the engine cannot serve such a draft, or None. Nothing asks yet: there is no export stage."""
        ...

    def write(self, draft: DraftModel, out: Path) -> None:
        """Write the export; ExportError where `unservable` says why."""
        ...
