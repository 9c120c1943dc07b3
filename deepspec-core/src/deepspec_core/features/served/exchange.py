"""The exchange folder: to which process each file belongs, and how much of the folder this process fills.

An engine writes a file, and the run removes it, so the run chooses the name. A file's name contains the name of its
request, which begins with a prefix that identifies this run and this process. A process removes only files with its own
prefix. Several runs, and several processes of one run, may share a folder.

Knows a folder, names and sizes. Does not know the contents of files, or servers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from attrs import define, field, frozen

from deepspec_core.disk import refuse_folder
from deepspec_core.errors import StageError

log = logging.getLogger("deepspec")

OWNER: Final = "exchange-owner"
_SWEEP_EVERY: Final = 5.0


def owner_of(folder: Path, *, may_write: bool = True) -> str:
    """What tells the run in this folder from all others: 16 digits, the same whenever it is asked.

    They are made from a random number in a file of the folder, from the folder's path, and from the inode numbers of
    both. So a copy is another run, on this machine or at the same path of another one. All machines of one run see the
    same numbers, because file systems that are shared have them. Where there is no number
    and it may not be written, the digits are random. StageError where the file of the number holds something else.
    """
    path = folder / OWNER
    refuse_folder(path)
    if not path.exists():
        if not may_write:
            return secrets.token_hex(8)
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".{OWNER}.{secrets.token_hex(4)}"
        new.write_text(secrets.token_hex(16) + "\n", encoding="ascii")
        try:
            os.link(new, path)  # the first of several processes has its number taken
        except OSError:
            if not path.exists():  # a file system without links
                os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    number = path.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch(r"[0-9a-f]{32}", number):
        raise StageError(
            "The file that identifies this run's files in the exchange folder is damaged",
            where=path,
            found=repr(number[:40]),
            expected="32 hexadecimal digits",
            fix="Remove this file. Files of earlier processes in the exchange folder then stay until you delete them.",
        )
    inodes = f"{folder.stat().st_ino}\0{path.stat().st_ino}"
    return hashlib.sha256(b"\0".join([number.encode(), os.fsencode(folder.resolve()), inodes.encode()])).hexdigest()[
        :16
    ]


@frozen(kw_only=True)
class Ownership:
    """A process of a run: `rank` of `world` processes, in one session from start to end."""

    owner: str
    rank: int = 0
    world: int = 1
    session: str = field(factory=lambda: secrets.token_hex(4))

    @property
    def beginning(self) -> str:
        """How the names of this session's requests begin."""
        return f"ds-{self.owner}-{self.rank}-{self.session}-"

    def is_own(self, file: str) -> bool:
        """Whether a file is this session's, or an earlier one's that this process cleans up after.

        A run works in one session at a time, and the number of its processes may change: rank r of n takes over from
        the earlier ranks r, r + n, r + 2n and so on, which no other process now does.
        """
        found = re.search(rf"ds-{self.owner}-(\d+)-[0-9a-f]{{8}}-", file)
        return found is not None and int(found[1]) % self.world == self.rank


@define(eq=False)
class Ticket:
    """A request that is under way. `settled`: its file was removed, or never will be written."""

    name: str
    settled: bool = False


@define(kw_only=True, eq=False)
class Exchange:
    """This process's share of the folder. All but `clear` is used in one event loop.

    folder: The exchange folder, without links.
    most: Bytes of this process's files at most, those included that servers are still to write.
    late: Seconds for which the file of a request that was given up may still come, and counts. For so long after
        `take_over`, files of an earlier process may still come, too.
    """

    folder: Path
    ownership: Ownership
    most: int
    late: float = 600.0
    used: int = 0
    peak: int = 0
    _number: int = 0
    _live: set[str] = field(factory=set)
    _given_up: dict[str, tuple[int, float]] = field(factory=dict)
    _waiting: deque[tuple[int, asyncio.Future[None]]] = field(factory=deque)
    _swept: float = 0.0
    _others_until: float = 0.0
    _stay: set[str] = field(factory=set)

    @asynccontextmanager
    async def ticket(self, size: int) -> AsyncIterator[Ticket]:
        """A request whose file has `size` bytes; waits until there is room for it. Whoever came first is first."""
        assert size <= self.most, "checked before the first request"
        await self._room(size)
        self._number += 1
        ticket = Ticket(f"{self.ownership.beginning}{self._number:09d}")  # none begins another
        self._live.add(ticket.name)
        try:
            yield ticket
        finally:
            self._live.discard(ticket.name)
            if ticket.settled:
                self._give_back(size)
            else:
                self._given_up[ticket.name] = (size, time.monotonic() + self.late)

    def clear(self, *, session: bool = False) -> tuple[int, int]:
        """Remove this process's files that nobody waits for. Returns (files, bytes), without lock files.

        `session`: only what this session has. A file that cannot be removed is told once, and stays.
        """
        count = total = 0
        stay: dict[str, str] = {}
        for entry in self._own_files():
            if any(name in entry.name for name in self._live):
                continue
            if session and self.ownership.beginning not in entry.name:
                continue
            try:
                size = entry.stat(follow_symlinks=False).st_size
                os.unlink(entry.path)
            except FileNotFoundError:
                continue
            except OSError as error:
                stay[entry.name] = error.strerror or str(error)
                continue
            if not entry.name.endswith(".lock"):
                count, total = count + 1, total + size
            for name in [name for name in self._given_up if name in entry.name]:
                self._give_back(self._given_up.pop(name)[0])
        self._tell(stay)
        return count, total

    def take_over(self) -> tuple[int, int]:
        """As `clear`, and files of an earlier process that come later are removed by `sweep`."""
        self._others_until = time.monotonic() + self.late
        return self.clear()

    def sweep(self) -> None:
        """Now and then: remove files of requests that were given up, and forget those that have not come."""
        now = time.monotonic()
        if now - self._swept < _SWEEP_EVERY or not (self._given_up or now < self._others_until):
            return
        self._swept = now
        self.clear()
        for name in [name for name, (_, end) in self._given_up.items() if end < now]:
            self._give_back(self._given_up.pop(name)[0])

    async def _room(self, size: int) -> None:
        self.sweep()
        if self._waiting or self.used + size > self.most:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry = (size, turn)
            self._waiting.append(entry)
            try:
                while not turn.done():
                    await asyncio.wait([turn], timeout=_SWEEP_EVERY)
                    self.sweep()
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._give_back(size)
                else:
                    self._waiting.remove(entry)
                    self._admit()
                raise
        else:
            self._take(size)

    def _take(self, size: int) -> None:
        self.used += size
        self.peak = max(self.peak, self.used)

    def _give_back(self, size: int) -> None:
        self.used -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.used + self._waiting[0][0] <= self.most:
            size, turn = self._waiting.popleft()
            self._take(size)
            turn.set_result(None)

    def _own_files(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.folder) as entries:
                return [entry for entry in entries if self.ownership.is_own(entry.name)]
        except OSError as error:
            self._tell({".": error.strerror or str(error)})
            return []

    def _tell(self, stay: Mapping[str, str]) -> None:
        """Say which of this run's files cannot be removed, each once."""
        new = sorted(stay.keys() - self._stay)
        self._stay.update(new)
        if new:
            log.warning(
                "%d of this run's files in %s cannot be removed (%s: %s). Let server and run have the same user, or a "
                "folder and a umask that let both remove files; then remove the remaining files by hand",
                len(new),
                self.folder,
                new[0],
                stay[new[0]],
            )
