"""How much of some work may fail before it is stopped, counted over all workers.

Knows numbers and what they are of; not why something failed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from attrs import frozen

from deepspec_core.crew import Crew
from deepspec_core.errors import DataError

# Below this many a share says little: the budget is then checked at the end only.
_AFTER: Final = 200


@frozen(kw_only=True)
class Words:
    """The words for messages. `work` identifies the budget among workers, and is unique in the run."""

    work: str
    problem: str
    key: str
    fix: str


REGENERATION: Final = Words(
    work="regenerate",
    problem="Too many conversations cannot be regenerated",
    key="regenerate.max_failures",
    fix="Read the reasons in that file; nothing that was regenerated is lost.",
)


class FailureBudget:
    """At most the share `most` of the work may fail. One failure is always allowed, unless `most` is 0.

    `where` is the file with the reasons. `done` conversations were answered before.
    """

    def __init__(self, crew: Crew, most: float, where: Path | str, *, done: int, words: Words = REGENERATION) -> None:
        self._crew, self._most, self._where, self._done, self._words = crew, most, where, done, words
        self._seen, self._failed = f"{words.work} seen", f"{words.work} failed"
        self._own_seen = self.own = 0
        crew.post(self._seen, 0)
        crew.post(self._failed, 0)

    def seen(self) -> None:
        """Count one more item of work of this worker."""
        self._own_seen += 1
        self._crew.post(self._seen, self._own_seen)

    def failed(self) -> None:
        """One of this worker's failed. Raises DataError if that is one too many."""
        self.own += 1
        self._crew.post(self._failed, self.own)
        self.check()

    def add(self, count: int, seen: int, why: str = "") -> None:
        """Add `count` failures of this worker.

        Raises DataError if there are now too many among the `seen` items of work.
        """
        self.own += count
        self._crew.post(self._failed, self.own)
        self.check_all(self.failures, seen, why)

    @property
    def failures(self) -> int:
        """The failures of all workers, as far as this one knows."""
        return int(self._crew.total(self._failed))

    def check(self) -> None:
        """Raise DataError if too many failed so far. With several workers, only the first checks this early."""
        seen = self._done + int(self._crew.total(self._seen))
        if self._most == 0 or (self._crew.first and seen >= _AFTER):
            self.check_all(self.failures, seen)

    def check_all(self, failures: int, seen: int, why: str = "") -> None:
        """Raise DataError if these are too many of `seen`. `why` is the reason of one of them."""
        if failures and not (self._most > 0 and failures <= math.ceil(self._most * seen)):
            raise DataError(
                self._words.problem,
                where=self._where,
                found=f"{failures} of {seen}" + (why and f"; {why}"),
                expected=f"at most {self._most:.1%} ({self._words.key})",
                fix=self._words.fix,
            )
