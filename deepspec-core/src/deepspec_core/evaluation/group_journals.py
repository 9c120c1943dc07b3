"""The journals of one evaluation: the final one, with groups in order, and those that several workers write beside it.

A worker's journal has the name of the final journal followed by the worker's number, and each of its lines has the
number of its group. The first worker copies all groups into the final journal when every worker is done, or when an
interrupted evaluation goes on; the number of workers may then differ. This file knows lines. It does not know what a
group holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec_core.crew import Crew
from deepspec_core.errors import DataError, StageError
from deepspec_core.journal import Journal


class GroupJournals:
    """The journals of `count` groups, begun or continued by a crew. Each journal begins with a head line.

    prompts: The digest of the prompts. machine: What decides how fast this worker decodes.
    done: The entries of finished groups by number, each with its place in the file for errors. Only the first worker
        has them.
    mine: The numbers of the missing groups that this worker decodes, in order.

    Raises StageError if a journal was begun with other prompts or on a machine of another speed. The number of threads
    may differ if the number of workers differs, because workers share the machine's cores.
    """

    def __init__(self, path: Path, *, prompts: str, machine: Mapping[str, Any], count: int, crew: Crew) -> None:
        self._path, self._count, self._crew = path, count, crew
        self._head: dict[str, Any] = {"prompts": prompts, "machine": dict(machine), "workers": crew.count}
        self._open: list[Journal] = []
        self.done: dict[int, tuple[dict[str, Any], str]] = {}
        try:
            self.mine = crew.share(self._begin())
        except BaseException:
            self.close()
            raise

    def _begin(self) -> list[int]:
        """The numbers of all missing groups."""
        told = None
        if self._crew.first:
            self._whole = self._journal(self._path)
            for number, entry in enumerate(self._whole.entries[1:]):
                self.done[number] = (entry, f"{self._path}:{number + 2}")
            self._written = len(self.done)
            self._read_parts()
            told = [self._head, [number for number in range(self._count) if number not in self.done]]
        head, missing = self._crew.told_by_first(f"groups of {self._path.name}", told)
        self._check(head, self._path)
        if self._crew.count > 1:
            self._own = self._journal(_part(self._path, self._crew.rank))
        return list(missing)

    def append(self, number: int, entry: Mapping[str, Any]) -> None:
        """Append a group that this worker has decoded to its journal."""
        if self._crew.count > 1:
            self._own.append({"group": number, **entry})
            return
        self._fill(number)
        self._whole.append(entry)
        self._written += 1

    def collect(self) -> None:
        """After all workers are done, the first one copies all groups into the final journal and fills `done`."""
        if self._crew.count > 1:
            size = self._own.path.stat().st_size
            sizes = self._crew.gather(f"all of {self._path.name}", size)
            if not self._crew.first:
                return
            for rank, size in enumerate(sizes):
                self._crew.require_seen(_part(self._path, rank), size)
            self._read_parts()
        self._fill(self._count)
        for part in _parts(self._path):
            part.unlink()

    def close(self) -> None:
        """Close this worker's files."""
        for journal in self._open:
            journal.close()

    def _journal(self, path: Path) -> Journal:
        """A journal to append to, with its head."""
        journal = Journal(path)
        self._open.append(journal)
        if not journal.entries:
            journal.append(self._head)
        else:
            self._check(journal.entries[0], path)
        return journal

    def _fill(self, until: int) -> None:
        """Copy the workers' groups up to a number into the final journal."""
        for number in range(self._written, until):
            self._whole.append(self.done[number][0])
        self._written = max(self._written, until)

    def _read_parts(self) -> None:
        for path in _parts(self._path):
            part = Journal(path)
            part.close()
            if part.entries:
                self._check(part.entries[0], path)
            for line, entry in enumerate(part.entries[1:], start=2):
                number = entry.pop("group", None)
                if type(number) is not int:
                    raise DataError("A line of a journal is damaged", where=f"{path}:{line}", found=f"group {number!r}")
                self.done.setdefault(number, (entry, f"{path}:{line}"))

    def _check(self, head: Mapping[str, Any], path: Path) -> None:
        """Raise StageError if groups under this head cannot be pooled with this worker's own."""
        own = self._head
        if head.get("prompts") != own["prompts"]:
            raise StageError(
                "The prompts are not those of the results that are there",
                where=path,
                found=own["prompts"][:16],
                expected=str(head.get("prompts", "prompts without a digest"))[:32],
                fix="Put the prompts back as they were, or discard the results with --force evaluate.",
            )
        machine, here = head.get("machine"), own["machine"]
        if head.get("workers", 1) != own["workers"] and isinstance(machine, dict):
            machine = {**machine, "threads": here.get("threads")} if here else machine
        if machine != here:
            raise StageError(
                "An evaluation cannot go on with another speed: its timings would be mixed",
                where=path,
                found=here,
                expected=head.get("machine"),
                fix="Go on as it was begun (run.threads, the machine), or discard the results with --force evaluate.",
            )


def _part(whole: Path, rank: int) -> Path:
    return whole.with_name(f"{whole.name}.{rank}")


def _parts(whole: Path) -> list[Path]:
    return [path for path in sorted(whole.parent.glob(f"{whole.name}.*")) if path.suffix[1:].isdigit()]
