"""What an exporter does: it writes a trained draft in the form that a serving engine loads, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from deepspec_core.contracts.draft import DraftDescription, DraftModel

__all__ = ["Exporter"]


@runtime_checkable
class Exporter(Protocol):
    """Writes the drafts of one algorithm in one export format."""

    def unservable(self, description: DraftDescription) -> str | None:
        """Why the engine cannot serve such a draft, or None. Asked before a run's first stage and before `write`."""
        ...

    def write(self, draft: DraftModel, out: Path) -> None:
        """Write the export's files into `out`, an empty folder, and nothing beside it.

        The folder gets its name when all of it is written. Links are refused, because an export is to be moved.
        """
        ...
