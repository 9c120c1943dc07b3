"""The features of many samples from servers, in order, requested ahead of their use.

A thread keeps the servers busy (servers/farm.py), as far ahead as `prefetch` samples and the exchange folder allow. The
order is that of the samples, whichever server answers first. Knows samples and a farm; does not know the requests.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from attrs import define, evolve, field

from deepspec_core.contracts.draft import Sample
from deepspec_core.data.answering import Unanswered
from deepspec_core.errors import DataError
from deepspec_core.features.served.answer_place import BadAnswer
from deepspec_core.features.served.asking import FeatureRequest, FeatureWork, Taken
from deepspec_core.servers.connection import Fault
from deepspec_core.servers.farm import Farm

_LOOK_EVERY = 0.02
_WAITING_EVERY = 0.5


class _Closed(Exception):
    """Nobody wants the rest."""


@define
class Tally:
    """What a process got from its servers so far. Written by the threads of streams, read by anyone.

    failed: Exchanges that failed, after which the text was asked for again, or its server taken out.
    """

    texts: int = 0
    bytes: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(factory=dict)
    _lock: threading.Lock = field(factory=threading.Lock, init=False, repr=False)

    def took(self, taken: Taken) -> None:
        """An answer was taken."""
        with self._lock:
            self.texts, self.bytes = self.texts + 1, self.bytes + taken.size

    def fault(self, fault: Fault) -> None:
        """An exchange failed."""
        why = fault.error.problem if isinstance(fault, BadAnswer) else fault.kind.value
        with self._lock:
            self.failed += 1
            self.reasons[why] = self.reasons.get(why, 0) + 1

    def summary(self) -> dict[str, Any]:
        """What a stage's summary says."""
        with self._lock:
            reasons = dict(sorted(self.reasons.items()))
            return {"texts from servers": self.texts, "bytes from servers": self.bytes, "failed exchanges": reasons}


def totals(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summaries of several processes' tallies as one."""
    reasons = sum((Counter(part["failed exchanges"]) for part in parts), Counter[str]())
    counts = {name: sum(part[name] for part in parts) for name in ("texts from servers", "bytes from servers")}
    return {**counts, "failed exchanges": dict(sorted(reasons.items()))}


class Stream:
    """The samples with features, in the order given. Iterate over it inside a `with` block, or `close` it.

    `prefetch`: Samples that are asked for ahead of the one that is used next, at most. They stand in memory as soon as
    they are read. `waiting`: called now and then while the next sample is waited for; its errors are raised. DataError
    where no server gives the features of a sample; ConfigError where no server can be used.
    """

    def __init__(
        self,
        farm: Farm,
        samples: Iterator[Sample],
        *,
        prefetch: int,
        tally: Tally,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._samples, self._prefetch, self._tally, self._waiting = samples, prefetch, tally, waiting
        self._changed = threading.Condition()
        self._handed: dict[int, Sample] = {}
        self._taken: dict[int, Taken] = {}
        self._next_handed = self._next_used = 0
        self._exhausted = self._closed = False
        self._error: BaseException | None = None
        self._farm = evolve(
            farm, look_every=_LOOK_EVERY, more=self._more, on_fault=tally.fault, on_look=self._end_if_closed
        )
        self._thread = threading.Thread(target=self._work, name="features from servers", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Sample]:
        while True:
            with self._changed:
                while not self._changed.wait_for(self._decided, timeout=_WAITING_EVERY):
                    self._waiting()
                if self._next_used in self._taken:
                    taken, sample = self._taken.pop(self._next_used), self._handed.pop(self._next_used)
                    self._next_used += 1
                elif self._error is not None:
                    raise self._error
                else:
                    return
            yield evolve(sample, features=taken.features)

    def close(self) -> None:
        """End the requests in flight, and remove this stream's files."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decided(self) -> bool:
        """Whether the next sample is there, or never will be."""
        ended = self._exhausted and self._next_used == self._next_handed
        return self._next_used in self._taken or self._error is not None or ended or self._closed

    def _more(self) -> bool:
        return not self._exhausted

    def _end_if_closed(self) -> None:
        if self._closed:
            raise _Closed

    def _hand_out(self) -> Iterator[FeatureRequest]:
        with self._changed:
            ahead = self._next_handed - self._next_used
        if self._exhausted or ahead >= self._prefetch:
            return iter(())
        sample = next(self._samples, None)
        with self._changed:
            if sample is None:
                self._exhausted = True
                self._changed.notify_all()
                return iter(())
            number, self._next_handed = self._next_handed, self._next_handed + 1
            self._handed[number] = sample
        return iter([FeatureRequest(id=str(number), input_ids=sample.input_ids)])

    def _work(self) -> None:
        try:
            for outcome in self._farm(self._hand_out):
                if isinstance(outcome, Unanswered):
                    raise self._refused(outcome)
                self._tally.took(outcome)
                with self._changed:
                    self._taken[int(outcome.id)] = outcome
                    self._changed.notify_all()
        except _Closed:
            pass
        except BaseException as error:  # told to whoever waits for a sample
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            work: Any = self._farm.work
            assert isinstance(work, FeatureWork)
            work.exchange.clear()

    def _refused(self, outcome: Unanswered) -> DataError:
        """The error of a text that no server answers, with the parts of what was wrong with its last answer."""
        sample, cause = self._handed[int(outcome.id)], outcome.cause
        told: Mapping[str, Any] = {}
        if isinstance(cause, BadAnswer):
            told = {"expected": cause.error.expected, "fix": cause.error.fix}
        return DataError(
            "No server gives the features of a sample",
            where=f"sample {sample.id}, {len(sample.input_ids)} tokens",
            found=outcome.reason,
            **told,
        )
