"""How many conversations may fail before a regeneration is stopped, counted over all workers.

Knows numbers; not why a conversation failed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from deepspec_core.crew import Crew
from deepspec_core.errors import DataError

# Below this many conversations a share says little: the budget is then checked at the end only.
_AFTER: Final = 200
_FAILED: Final = "regenerate failed"
_SEEN: Final = "regenerate seen"


class FailureBudget:
    """At most the share `most` of what is seen may fail; one in a small set is always forgiven.

    `where` is the file with the reasons. `done` conversations were seen and answered before.
    """

    def __init__(self, crew: Crew, most: float, where: Path, *, done: int) -> None:
        self._crew, self._most, self._where, self._done = crew, most, where, done
        self._own_seen = self.own = 0
        crew.post(_SEEN, 0)
        crew.post(_FAILED, 0)

    def seen(self) -> None:
        """This worker took up one more."""
        self._own_seen += 1
        self._crew.post(_SEEN, self._own_seen)

    def failed(self) -> None:
        """One of this worker's failed. DataError where that is one too many."""
        self.own += 1
        self._crew.post(_FAILED, self.own)
        self.check()

    @property
    def failures(self) -> int:
        """Of all workers, as far as this one knows."""
        return int(self._crew.total(_FAILED))

    def check(self) -> None:
        """DataError where too many failed so far. Of several workers only the first knows enough to say it early."""
        seen = self._done + int(self._crew.total(_SEEN))
        if self._most == 0 or (self._crew.first and seen >= _AFTER):
            self.check_all(self.failures, seen)

    def check_all(self, failures: int, seen: int) -> None:
        """DataError where these are too many of all."""
        if failures and not (self._most > 0 and failures <= math.ceil(self._most * seen)):
            raise DataError(
                "Too many conversations cannot be regenerated",
                where=self._where,
                found=f"{failures} of {seen}",
                expected=f"at most {self._most:.1%} (regenerate.max_failures)",
                fix="Read the reasons in that file; nothing that was regenerated is lost.",
            )
