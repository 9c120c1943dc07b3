"""What a server counts of its speculative decoding: the text of /metrics as numbers, and two readings as a difference.

Knows the text form of Prometheus and what counters mean. Which counters an engine has is in engines.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from attrs import field, frozen

_LINE: Final = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+([^\s]+)(?:\s+\d+)?$")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_STARTED: Final = "process_start_time_seconds"


class NoCounters(Exception):
    """The text has none of an engine's counters."""


class Reset(Exception):
    """A server counted from anew between two readings."""


@frozen(kw_only=True)
class Tally:
    """Rounds of speculative decoding, as a server counts them.

    rounds: Proposals that were verified. proposed, accepted: their tokens, the target's own not among them.
    accepted_at: By position in a proposal, how often its token was accepted. None where the server does not tell.
    """

    rounds: int
    accepted: int
    proposed: int | None = None
    accepted_at: tuple[int, ...] | None = None

    def plus(self, other: Tally) -> Tally:
        """Both together; what one of them does not know, the sum does not."""
        proposed = None if self.proposed is None or other.proposed is None else self.proposed + other.proposed
        at = None
        if self.accepted_at is not None and other.accepted_at is not None:
            at = _added(self.accepted_at, other.accepted_at, 1)
        return Tally(
            rounds=self.rounds + other.rounds,
            accepted=self.accepted + other.accepted,
            proposed=proposed,
            accepted_at=at,
        )


@frozen(kw_only=True)
class Names:
    """How an engine calls its counters. `speculation` are rounds, proposed and accepted tokens; None: it has none.

    generated: All tokens that it generated. running: gauges of requests under way. position: the label of `accepted_at`
    that has the position, from 0.
    """

    generated: str
    running: tuple[str, ...]
    speculation: tuple[str, str, str] | None = None
    accepted_at: str | None = None
    position: str = "position"


@frozen(kw_only=True)
class Reading:
    """The counters at one time. `tally` is None where the server counts no rounds at all."""

    generated: int
    running: int
    tally: Tally | None
    started: float | None = field(default=None)

    def since(self, before: Reading) -> Reading:
        """What was counted in between. Reset where a counter fell, or the process is another."""
        if self.started != before.started or self.generated < before.generated:
            raise Reset
        tally = self.tally
        if tally is not None and before.tally is not None:
            was = before.tally
            at = None if tally.accepted_at is None else _added(tally.accepted_at, was.accepted_at or (), -1)
            tally = Tally(
                rounds=tally.rounds - was.rounds,
                accepted=tally.accepted - was.accepted,
                proposed=None if tally.proposed is None or was.proposed is None else tally.proposed - was.proposed,
                accepted_at=at,
            )
            if min(tally.rounds, tally.accepted, tally.proposed or 0, *(at or (0,))) < 0:
                raise Reset
        return Reading(
            generated=self.generated - before.generated, running=self.running, tally=tally, started=self.started
        )


def reading(text: str, names: Names) -> Reading:
    """The counters in the text of /metrics, those of several engines or models in one server together.

    NoCounters where the text has no count of generated tokens.
    """
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for name, labels, value in _samples(text):
        found.setdefault(name, []).append((labels, value))

    def total(name: str) -> int | None:
        return round(sum(value for _, value in found[name])) if name in found else None

    generated = total(names.generated)
    if generated is None:
        raise NoCounters
    tally, counted = None, [total(name) for name in names.speculation or ()]
    if counted and counted[0] is not None and counted[2] is not None:
        at: dict[int, float] = {}
        for labels, value in found.get(names.accepted_at or "", ()):
            position = labels.get(names.position, "")
            if position.isascii() and position.isdigit():
                at[int(position)] = at.get(int(position), 0) + value
        positions = range(max(at, default=-1) + 1)
        tally = Tally(
            rounds=counted[0],
            proposed=counted[1],
            accepted=counted[2],
            accepted_at=tuple(round(at.get(position, 0)) for position in positions) if at else None,
        )
    started = found.get(_STARTED)
    return Reading(
        generated=generated,
        running=sum(total(name) or 0 for name in names.running),
        tally=tally,
        started=None if started is None else started[0][1],
    )


def _samples(text: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    for line in text.splitlines():
        match = _LINE.match(line.strip())
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if math.isfinite(value):
            yield match[1], dict(_LABEL.findall(match[2] or "")), value


def _added(one: Sequence[int], other: Sequence[int], sign: int) -> tuple[int, ...]:
    longest = range(max(len(one), len(other)))
    first = [one[k] if k < len(one) else 0 for k in longest]
    second = [other[k] if k < len(other) else 0 for k in longest]
    return tuple(a + sign * b for a, b in zip(first, second, strict=True))
