"""The contract of exporters. An exporter writes a trained draft in a serving engine's format, or says why it cannot.

Knows what a draft is and where it comes from. Does not know any format or engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from attrs import field, frozen

from deepspec_core.contracts.draft import DraftDescription, DraftModel

__all__ = ["ExportFacts", "Exporter", "TargetName"]


@frozen(kw_only=True)
class TargetName:
    """The target's name in an export. An export may be moved to another machine, so the name has no local path.

    name: The Hub id or `builtin:NAME` in the run file; for a local directory, the last part of its path.
    local: Whether it was a local directory.
    """

    name: str
    local: bool = False


@frozen(kw_only=True, eq=False)
class ExportFacts:
    """Facts about a draft that need none of its weights. All except `results` are known before a run's first stage.

    config: The keys of the checkpoint's config.json. Its `dtype` is that of the stored weights.
    shapes: The shapes of the weights, by published name.
    softcap: The soft cap of the draft's logits; None if there is none.
    target: None if no file beside the checkpoint names the target.
    settings: Sections and keys of the run file that made the draft, as in TOML; empty if they are not known. Local
        paths are shortened to their last part.
    results: The `results` in metrics.json of an evaluation of exactly this draft; empty if there is none.
    tokenizer: Loads the target's tokenizer (transformers), for formats that include one. It raises TargetError if it
        cannot. None if the target's place is not known.
    reduced: If the vocabulary was reduced for the export: `tokens`, `of`, `covered`, and `measured`, the accepted
        length before and after. Empty otherwise.
    untrained: Whether the weights are still the initial random ones, for an export that is tried before training.
    """

    description: DraftDescription
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    softcap: float | None
    target: TargetName | None
    settings: Mapping[str, Any] = field(factory=dict)
    results: Sequence[Mapping[str, Any]] = ()
    tokenizer: Callable[[], Any] | None = None
    reduced: Mapping[str, Any] = field(factory=dict)
    untrained: bool = False


@runtime_checkable
class Exporter(Protocol):
    """Writes the drafts of one algorithm in one export format."""

    def unservable(self, facts: ExportFacts) -> str | None:
        """Why the engine cannot serve such a draft, and the nearest alternative; None if it can.

        Core calls it before a run's first stage and before `write`. It may raise a DeepSpecError, which the user sees
        unchanged.
        """
        ...

    def write(self, draft: DraftModel, facts: ExportFacts, out: Path) -> None:
        """Write the export's files into `out`, an empty folder, and nothing outside it.

        `out` is a temporary folder, which core renames when all files are written. Core refuses links, because they
        would break when the export is moved or the other file changes, and pickles, because loading them may run any
        code. The facts stay as they are, and so do global random numbers. An exporter that checks its own files raises
        ExportError if they are not what the engine needs.
        """
        ...
