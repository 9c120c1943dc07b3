"""The files into which the workers of a regeneration write: the final file's partial file, or one file for each worker.

A worker's file has the name of the whole file and the worker's number. The first worker merges these files when all are
done, or when an interrupted run continues, with whatever number of workers. Knows lines and names of files; does not
know the contents of a conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deepspec_core.crew import Crew
from deepspec_core.data.regenerated_file import beside, cut_answers, resume, write_line
from deepspec_core.errors import DataError
from deepspec_core.json_lines import json_value


class WorkerFiles:
    """This worker's files, and what was done before any worker began.

    lines: Where it appends its conversations.
    failures: Where it appends what was not answered.
    finished: The ids that need not be asked, those with a cut first answer included.
    cut: How many of them those are.
    """

    def __init__(self, partial: Path, failures: Path, crew: Crew) -> None:
        self._partial, self._failures, self._crew = partial, failures, crew
        sizes = None
        if crew.first:
            _add_lines(partial)
            cut = _all_cut(failures)
            with failures.open("wb") as side:
                for entry in cut.values():
                    write_line(side, entry)
            _remove(failures)
            done = resume(partial).keys()
            sizes = [path.stat().st_size if path.exists() else 0 for path in (partial, failures)]
        sizes = crew.told_by_first("regenerate begins", sizes)
        if not crew.first:
            for path, size in zip((partial, failures), sizes, strict=True):
                if size:
                    crew.require_seen(path, size)
            done, cut = resume(partial).keys(), cut_answers(failures)
        self.finished, self.cut = done | cut.keys(), len(cut)
        alone = crew.count == 1
        self.lines, self.failures = (path if alone else _part(path, crew.rank) for path in (partial, failures))

    def collect(self, counts: dict[str, int], order: Iterable[str]) -> Counter[str]:
        """The sum of all workers' counts, when all are done. The first one adds their files to the whole.

        `order` has the ids of all conversations. Raises DataError if workers read others.
        """
        if self._crew.count == 1:
            return Counter(counts)
        read = hashlib.sha256(json.dumps(list(order)).encode()).hexdigest()
        sizes = [path.stat().st_size for path in (self.lines, self.failures)]
        told = self._crew.gather("regenerate done", [counts, read, sizes])
        if self._crew.first:
            for rank, (_, theirs, written) in enumerate(told):
                if theirs != read:
                    raise DataError(
                        f"Worker {rank} read other conversations than the first worker",
                        where="data.sources",
                        expected="the same sources on every machine",
                    )
                for path, size in zip((self._partial, self._failures), written, strict=True):
                    self._crew.require_seen(_part(path, rank), size)
            with self._failures.open("ab") as side:
                for part in _parts(self._failures):
                    for entry in _entries(part):
                        write_line(side, entry)
            _remove(self._failures)
            _add_lines(self._partial)
        return sum((Counter(theirs) for theirs, _, _ in told), Counter())


def _part(whole: Path, rank: int) -> Path:
    return beside(whole, f".{rank}")


def _parts(whole: Path) -> list[Path]:
    return [path for path in sorted(whole.parent.glob(f"{whole.name}.*")) if path.suffix[1:].isdigit()]


def _remove(whole: Path) -> None:
    """The workers' files, which stand in the whole by now."""
    for part in _parts(whole):
        part.unlink()


def _add_lines(partial: Path) -> None:
    """What stands in the whole already is not added again, so a kill in between costs nothing."""
    parts = _parts(partial)
    known = set(resume(partial)) if parts else set()
    for part in parts:
        new = [offset for identity, offset in resume(part).items() if identity not in known]
        with part.open("rb") as lines, partial.open("ab") as whole:
            for offset in new:
                lines.seek(offset)
                whole.write(lines.readline())
    _remove(partial)


def _all_cut(failures: Path) -> dict[str, dict[str, Any]]:
    """Those of the whole file and of the workers' files. Failed conversations are tried again."""
    found: dict[str, dict[str, Any]] = {}
    for path in (failures, *_parts(failures)):
        found |= cut_answers(path)
    return found


def _entries(part: Path) -> Iterator[dict[str, Any]]:
    with part.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield json_value(line, f"{part}:{number}")
