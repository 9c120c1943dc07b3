"""Rows that cannot be used: counts, reports and stores them, and refuses a source with too many.

Knows rows and the reasons why they were dropped. Does not know what makes a row bad (messages.py, conversations.py).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from attrs import define, field, frozen

from deepspec_core.data.messages import UnusableRow
from deepspec_core.data.source_row import SourceRow
from deepspec_core.disk import full_disk_is_an_error
from deepspec_core.errors import DataError

# The number of characters of JSON that are kept of a bad row. A longer row contains an image, or is damaged.
_LONGEST: Final = 1 << 14
_LONGEST_REASON: Final = 200
_REASONS_SHOWN: Final = 3
# Below this many rows, a share says little.
_AFTER: Final = 200
# This many standard deviations above the budget, the bad rows at the beginning are not a matter of chance.
_DEVIATIONS: Final = 4


@frozen(kw_only=True)
class BadRow:
    """A dropped row: its place, and the reason in words. `count` is the name it is counted under."""

    where: str
    reason: str
    count: str


@define
class OfOneSource:
    """The counts of one source's rows. `checked`: All rows were read and counted before."""

    name: str
    checked: bool = True
    rows: int = 0
    bad: Counter[str] = field(factory=Counter)


class BadRows:
    """The bad rows of one reading of sources.

    `most` is the share of a source's rows that may be bad; one row may be in any case, unless it is 0. `tell` is told
    each. The file `keep_in` gets them all when the reading ends, or, where a source has too many, the first
    `most_kept` of them.
    """

    def __init__(
        self,
        *,
        most: float = 1.0,
        keep_in: Path | None = None,
        most_kept: int | None = None,
        tell: Callable[[BadRow], None] = lambda _: None,
    ) -> None:
        self.number = 0
        self._most, self._keep_in, self._most_kept, self._tell = most, keep_in, most_kept, tell
        self._kept: IO[bytes] | None = None

    def add(self, row: SourceRow, error: DataError, source: OfOneSource) -> str:
        """Drop a row. Returns the name that it is counted under: "unusable" if it is well-formed, else "malformed".

        Raises DataError if the source is not `checked` and far more of its first rows are bad than may be.
        """
        found = "" if error.found is None else f" ({str(error.found)[:_LONGEST_REASON]})"
        bad = BadRow(
            where=str(error.where or row.where),
            reason=error.problem[0].lower() + error.problem[1:] + found,
            count="unusable" if isinstance(error, UnusableRow) else "malformed",
        )
        self.number += 1
        source.bad[error.problem] += 1
        self._tell(bad)
        if self._keep_in is not None and (self._most_kept is None or self.number <= self._most_kept):
            self._keep(row, bad)
        allowed = self._most * source.rows
        far = source.rows >= _AFTER and source.bad.total() > allowed + _DEVIATIONS * math.sqrt(allowed)
        if not source.checked and (far or self._most == 0):
            raise self._too_many(source, "the first ")
        return bad.count

    def check(self, source: OfOneSource) -> None:
        """Raise DataError if a source that was read has too many bad rows."""
        if source.bad.total() > (max(1, self._most * source.rows) if self._most > 0 else 0):
            raise self._too_many(source)

    def _too_many(self, source: OfOneSource, which: str = "") -> DataError:
        """The error. The file has the bad rows then."""
        self.finish()
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in source.bad.most_common(_REASONS_SHOWN))
        return DataError(
            "Too many rows of a source cannot be used",
            where=f"data.sources: {source.name}",
            found=f"{source.bad.total():,} of {which}{source.rows:,} rows. {reasons}",
            expected=f"at most a share of {self._most:g} (data.max_bad_rows)",
            fix="Correct the rows, name their `columns`, or raise data.max_bad_rows."
            + (f" {self._keep_in} lists {self._which()} with their reasons." if self._keep_in else ""),
        )

    def _which(self) -> str:
        cut = self._most_kept is not None and self.number > self._most_kept
        return f"the first {self._most_kept:,}" if cut else "all of them"

    def finish(self) -> None:
        """Write the bad rows to their file, or remove an older file if there are none."""
        if self._keep_in is None:
            return
        if self._kept is None:
            self._keep_in.unlink(missing_ok=True)
            return
        self._kept.seek(0)
        with full_disk_is_an_error(self._keep_in.parent):
            self._keep_in.parent.mkdir(parents=True, exist_ok=True)
            partial = self._keep_in.with_name(f".{self._keep_in.name}.{os.getpid()}")
            with partial.open("wb") as file:
                shutil.copyfileobj(self._kept, file)
            os.replace(partial, self._keep_in)

    def _keep(self, row: SourceRow, bad: BadRow) -> None:
        text = row.text or json.dumps(row.value, ensure_ascii=False, default=str)
        entry = {"where": bad.where, "reason": bad.reason, "row": text[:_LONGEST]}
        if len(text) > _LONGEST:
            entry["row_characters"] = str(len(text))
        with full_disk_is_an_error(Path(tempfile.gettempdir())):
            if self._kept is None:
                self._kept = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
            self._kept.write(json.dumps(entry).encode() + b"\n")
            self._kept.flush()
