"""A server's counters of speculative decoding: parses the text of /metrics, and takes the difference of two readings.

Knows the text format of Prometheus and what counters mean. engines.py knows which counters an engine has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final

from attrs import field, frozen

_LINE: Final = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+([^\s]+)(?:\s+\d+)?$")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_STARTED: Final = "process_start_time_seconds"
_MOST_POSITIONS: Final = 1024
# Counters are doubles, which hold every whole number up to this one.
_MOST: Final = 2**53


class NoCounters(Exception):
    """The text has none of an engine's counters."""


class Impossible(Exception):
    """Counters that cannot be, in words."""


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


def impossible(tally: Tally, *, at_least: int = 0) -> str | None:
    """Why no engine can have counted this, with the numbers; None where one can.

    at_least: Tokens that the rounds gave for certain, those that were accepted and one of the target's own each round.
    An engine may count tokens after an answer's end too, so there may be more. Its counts by position may end before
    its longest proposal does.
    """
    rounds, accepted, proposed, at = tally.rounds, tally.accepted, tally.proposed, tally.accepted_at or ()
    for name, value in (("rounds", rounds), ("accepted tokens", accepted), ("proposed tokens", proposed or 0)):
        if not 0 <= value <= _MOST:
            return f"{_number(value)} {name}"
    if proposed is not None and accepted > proposed:
        return f"{accepted:,} accepted tokens of {proposed:,} proposed"
    if rounds == 0 and max(accepted, proposed or 0) > 0:
        return f"{max(accepted, proposed or 0):,} tokens in 0 rounds"
    counts = (rounds, *at)
    if min(counts) < 0 or any(after > before for before, after in pairwise(counts)):
        return f"{rounds:,} rounds, which accepted by position {', '.join(map(_number, at[:8]))}"
    # Where no round accepted the last position, none can have accepted one after it.
    if tally.accepted_at is not None and (sum(at) > accepted or (sum(at) < accepted and counts[-1] == 0)):
        return f"{accepted:,} accepted tokens, and {sum(at):,} by position"
    if rounds + accepted < at_least:
        return f"{rounds:,} rounds with {accepted:,} accepted tokens, for {at_least:,} tokens of answers"
    return None


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

    NoCounters where the text has no count of generated tokens. Impossible where a count or a position is beyond bounds.
    """
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for name, labels, value in _samples(text):
        found.setdefault(name, []).append((labels, value))

    def total(name: str) -> int | None:
        return round(sum(_count(name, value) for _, value in found[name])) if name in found else None

    generated = total(names.generated)
    if generated is None:
        raise NoCounters
    tally, counted = None, [total(name) for name in names.speculation or ()]
    if counted and counted[0] is not None and counted[2] is not None:
        at: dict[int, float] = {}
        for labels, value in found.get(names.accepted_at or "", ()):
            position = labels.get(names.position, "")
            if position.isascii() and position.isdigit():
                # Python refuses to read thousands of digits.
                if len(position) > len(str(_MOST_POSITIONS)) or int(position) >= _MOST_POSITIONS:
                    raise Impossible(f"{names.accepted_at} of a position {position[:16]}")
                at[int(position)] = at.get(int(position), 0) + _count(names.accepted_at or "", value)
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


def _count(name: str, value: float) -> float:
    if not 0 <= value <= _MOST:
        raise Impossible(f"{name} {value:g}")
    return value


def _number(value: int) -> str:
    # Python refuses to write thousands of digits.
    return f"{value:,}" if abs(value) <= _MOST else f"more than {_MOST:,}" if value > 0 else f"less than -{_MOST:,}"


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
