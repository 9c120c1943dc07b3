"""What an exporter does: it writes a trained draft in the form that a serving engine loads, or says why it cannot.

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
    """What a target is called in an export, which may be moved to another machine.

    name: The Hub id or `builtin:NAME` that the run file gives; of a local directory, its last part.
    local: Whether it was a local directory.
    """

    name: str
    local: bool = False


@frozen(kw_only=True, eq=False)
class ExportFacts:
    """What is known of a draft without its weights: all of it before a run's first stage, but for `results`.

    config: The keys of its checkpoint's config.json. Its `dtype` is that of the stored weights.
    shapes: The shapes of its weights, by published name.
    softcap: The soft cap of the draft's logits; None if there is none.
    target: None if nothing beside a checkpoint says what its target is called.
    settings: Sections and keys of the run file that made the draft, as in TOML; empty if they are not known. A local
        path stands there by its last part.
    results: The `results` of the metrics.json of an evaluation of this very draft; empty if there is none.
    tokenizer: Loads the target's tokenizer (transformers), for formats that hold one: TargetError where it cannot be
        had. None if nothing says where the target is.
    reduced: Of a vocabulary that was reduced for the export: `tokens`, `of`, `covered`, and `measured`, the accepted
        length before and after. Empty otherwise.
    untrained: Whether the weights are as they were drawn, for something to load before there is a draft.
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
        """Why the engine cannot serve such a draft, and the nearest alternative, or None.

        Asked before a run's first stage and before `write`. A DeepSpecError is said as it is.
        """
        ...

    def write(self, draft: DraftModel, facts: ExportFacts, out: Path) -> None:
        """Write the export's files into `out`, an empty folder, and nothing beside it.

        The folder gets its name when all of it is written. Links are refused, because an export is to be moved. An
        exporter that checks what it wrote raises ExportError where it is not what the engine would need.
        """
        ...
