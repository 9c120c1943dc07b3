"""The result of a diagnosis: stages with their figures, findings that explain drops, and the first stage that drops.

This file knows names, figures and sentences. It does not know how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from attrs import asdict, field, frozen

from deepspec_core.diagnosis.outcomes import Difference

RECORDED: Final = "recorded"
REPLAYED: Final = "replayed"
PRECISION: Final = "precision"
LIVE: Final = "live"
HELD_OUT: Final = "held-out"
PROMPTS: Final = "prompts"
ENGINE: Final = "engine"
SERVED: Final = "served"

# A description of each stage, and of what changed since the stage before it.
STAGES: Final = {
    RECORDED: "as training recorded it in its last steps",
    REPLAYED: "the finished draft on training samples, with the features that training read",
    PRECISION: "the same in the number format of evaluation",
    LIVE: "the same with features of the target as evaluation loads it",
    HELD_OUT: "texts of the same kind that nobody trained on",
    PROMPTS: "evaluation's prompts, with the target's own greedy answers",
    ENGINE: "the engine's rounds in these very answers",
    SERVED: "the rounds that a server counted",
}
# Advice for a stage that drops without a finding that explains it.
_FIXES: Final = {
    REPLAYED: "Evaluate a checkpoint of train/checkpoints, and compare its files with those of the draft.",
    PRECISION: "Set target.dtype to the precision of training, or train in that of evaluation.",
    LIVE: "Make the cache again with the target that is evaluated (--force cache), and train again.",
    HELD_OUT: "Train on more or more varied data, or for fewer epochs: the draft knows its own samples better.",
    PROMPTS: "Train on prompts like those that are evaluated.",
    ENGINE: "Look at the draft's proposer: it does not say what the training pass says at the same places.",
    SERVED: "Compare the server's model, template, sampling and number format with those of the engine.",
}


@frozen(kw_only=True)
class Stage:
    """The figures of one stage.

    shares: By position, the share of the draft's tokens that match, whether or not the tokens before them match.
    conditional: By position, the same share, given that all tokens before match. Empty where only `shares` are known.
    accepted: Accepted draft tokens per round, computed from `conditional`.
    unfit: The number of the draft's outputs that are not finite.
    against: The name of the last stage before it that was measured; None for the first stage.
    difference: The difference from that stage, and what: the name of the figure that is compared.
    rates: By position, the mean acceptance rate at temperature 1, where it is known.
    """

    name: str
    shares: Sequence[float | None] = ()
    conditional: Sequence[float | None] = ()
    accepted: float | None = None
    interval: tuple[float, float] | None = None
    blocks: int = 0
    groups: int = 0
    unfit: int = 0
    rates: Sequence[float] = ()
    against: str | None = None
    difference: Difference | None = None
    what: str = "draft tokens accepted a round"
    drops: bool = False


@frozen(kw_only=True)
class Finding:
    """A difference that a check found directly.

    says: One or more sentences with the evidence. fix: An imperative sentence. explains: The stages whose drop the
    difference would cause, in order.
    """

    name: str
    says: str
    fix: str
    explains: tuple[str, ...]


@frozen(kw_only=True)
class Diagnosis:
    """Everything that was measured. `facts` has the checks' results in JSON types, `not_measured` reasons for gaps."""

    stages: tuple[Stage, ...]
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]
    not_measured: Mapping[str, str]
    tolerance: float = 0.1
    about: Mapping[str, Any] = field(factory=dict)

    @property
    def first(self) -> Stage | None:
        """The first stage that drops."""
        return next((stage for stage in self.stages if stage.drops), None)

    @property
    def causes(self) -> tuple[Finding, ...]:
        """The findings that explain the first drop. All findings if nothing drops."""
        first = self.first
        return tuple(one for one in self.findings if first is None or first.name in one.explains)

    def sentences(self) -> list[str]:
        """The verdict in plain sentences. The first stage that drops comes first."""
        first, causes = self.first, self.causes
        if first is None and not causes:
            return [f"Nothing found: {self._agreement()}", *self._beside()]
        said = []
        if first is None:
            said.append(f"No stage drops, and these differences were seen. {self._agreement()}")
        else:
            assert first.difference is not None
            said.append(
                f"The first stage that drops is `{first.name}`: {STAGES[first.name]}. Its {first.what} are "
                f"{first.difference.later:.3f} after {first.difference.earlier:.3f} at `{first.against}` (a difference "
                f"of {first.difference.later - first.difference.earlier:+.3f}, 99% interval "
                f"{first.difference.interval[0]:+.3f} to {first.difference.interval[1]:+.3f})."
            )
            if not causes:
                said.append(f"No single cause was seen. {_FIXES[first.name]}")
        said += [f"{one.name}: {one.says} {one.fix}" for one in causes]
        return said + self._beside()

    def _beside(self) -> list[str]:
        other = [one for one in self.findings if one not in self.causes]
        return [f"Seen beside it: {one.name}: {one.says}" for one in other]

    def _agreement(self) -> str:
        compared = [stage for stage in self.stages if stage.difference is not None]
        if not compared:
            return "No two stages could be compared."
        parts = [
            f"`{stage.name}` {stage.difference.later - stage.difference.earlier:+.3f} "
            f"({stage.difference.interval[0]:+.3f} to {stage.difference.interval[1]:+.3f})"
            for stage in compared
            if stage.difference is not None
        ]
        return (
            f"each stage agrees with the one before it within noise, or is lower by at most {self.tolerance:.0%}. "
            f"Differences with their 99% intervals: {', '.join(parts)}."
        )

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types. A figure that is not finite is null."""
        first = self.first
        whole: dict[str, Any] = _finite(
            {
                "version": 1,
                **self.about,
                "tolerance": self.tolerance,
                "first_drop": None if first is None else first.name,
                "causes": [one.name for one in self.causes],
                "verdict": self.sentences(),
                "stages": [{**asdict(stage), "is": STAGES[stage.name]} for stage in self.stages],
                "findings": [asdict(one) for one in self.findings],
                "facts": dict(self.facts),
                "not_measured": dict(self.not_measured),
            }
        )
        return whole


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
