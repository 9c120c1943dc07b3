"""Many servers as one answerer: each request is answered once, by whichever server can.

A request that fails on one server is sent again, to another server if there is one. A request that a server refuses is
sent once more, to another server. If that server answers it, the refusal counts as the first server's fault. A server
that cannot answer is taken out. Its requests go to the other servers, and it is probed until it can be used again. The
farm's work (servers/work.py) decides what is asked and how an answer is read. This file knows servers and requests. It
does not know dialects or conversations.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from attrs import define, field

from deepspec_core.data.answering import Unanswered
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.servers.connection import Connection, Fault, Kind, Refusal, client
from deepspec_core.servers.last_run import run_last
from deepspec_core.servers.level import Level
from deepspec_core.servers.member import Job, Member
from deepspec_core.servers.probe import NotServed, NotServedNow
from deepspec_core.servers.work import Work

log = logging.getLogger("deepspec")

# The number of failed attempts after which a request is given up. A server that is down does not count as an attempt.
_ATTEMPTS: Final = 5
# Unusable answers in a row after which a server is taken out. A refusal of a request that another answers counts too.
_STRIKES: Final = 3
_LONGEST_PAUSE: Final = 60.0


@define(kw_only=True)
class Farm:
    """Servers by address. With the work of servers/answering.py, a farm is an Answerer of data/answering.py.

    pause: Seconds before a request or a server is tried again; doubled each time. idle: seconds without a request after
    which a server is probed before its next request. health_every: seconds between health checks of a silent server.
    look_every: seconds between looks for further requests while no answer comes. say_after: seconds after which a
    server that has not answered its probe is named in the log.
    more: Whether further requests may still come when none is available, so that the farm waits for them.
    on_fault: Called with each failed exchange's fault. on_look: called at every look; an error it raises ends the call.
    """

    addresses: Sequence[str]
    work: Work
    pause: float = 0.5
    idle: float = 10.0
    health_every: float = 30.0
    look_every: float = 1.0
    say_after: float = 5.0
    more: Callable[[], bool] = lambda: False
    on_fault: Callable[[Fault], None] = lambda _fault: None
    on_look: Callable[[], None] = lambda: None

    def check(self, *, strict: bool = True) -> None:
        """Raise ConfigError if no server can be used; if `strict`, also if a server is not what it should be.

        A server that is not up yet, or that cannot be used now, only causes a warning.
        """
        with asyncio.Runner() as runner:
            session = _Session(self, lambda: iter(()))
            try:
                runner.run(session.open(strict=strict))
            finally:
                run_last(runner, session.close())

    def __call__(self, hand_out: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Yield answers and Unanswered as they come.

        `hand_out()` gives the requests that are available now. It is called whenever a server has room. Raises
        DataError if no server can be used for `work.wanted.timeout` seconds.
        """
        with asyncio.Runner() as runner:
            session = _Session(self, hand_out)
            try:
                # A server that was replaced by another one since the check stays out. The others go on.
                runner.run(session.open(strict=False))
                while outcomes := runner.run(session.some()):
                    yield from outcomes
                session.say()
            finally:
                run_last(runner, session.close())


@define(eq=False)
class _Session:
    """One call of a farm. It runs on one event loop, which is paused while the caller handles an answer."""

    farm: Farm
    hand_out: Callable[[], Iterator[Any]]
    servers: list[Member] = field(factory=list)
    waiting: deque[Job] = field(factory=deque)
    revivals: dict[asyncio.Task[Any], Member] = field(factory=dict)
    watches: dict[asyncio.Task[None], Member] = field(factory=dict)
    _stack: AsyncExitStack = field(factory=AsyncExitStack)
    _heard: float = field(factory=time.monotonic)

    async def open(self, *, strict: bool) -> None:
        """Probe all servers. Raises ConfigError as Farm.check does."""
        work = self.farm.work
        shared = await self._stack.enter_async_context(client(work.wanted.key))
        for address in dict.fromkeys(self.farm.addresses):
            self.servers.append(Member(Connection(address, shared), Level(work.wanted.max_concurrency)))
        found = await self._probed()
        usable = any(not isinstance(served, BaseException) for served in found)
        refused = [served for served in found if isinstance(served, NotServed)]
        away = []
        for server, served in zip(self.servers, found, strict=True):
            if isinstance(served, Fault):
                away.append(f"{server.connection.address}: {served.reason}")
            elif isinstance(served, BaseException) and not isinstance(served, NotServed):
                raise served
        if refused and (not usable or (strict and not all(isinstance(one, NotServedNow) for one in refused))):
            for reason in away:
                log.warning("no answer from %s", reason)
            raise ConfigError("servers cannot answer for this target", problems=refused)
        if len(away) == len(self.servers):
            raise ConfigError(
                "no server answers",
                where=work.wanted.called.servers,
                found="; ".join(away),
                fix="Start them, or correct them.",
            )
        for server, served in zip(self.servers, found, strict=True):
            if isinstance(served, Fault):
                self._take_out(server, str(served))
            elif isinstance(served, NotServed):
                log.warning("%s stays out: %s", server.connection.address, served)
                server.out, server.why = True, served.problem
                self.revivals[asyncio.create_task(self._revive(server, said=str(served)))] = server
            else:
                self._let_in(server, served)

    async def _probed(self) -> list[Any]:
        """What each server's probe returned or raised. Servers whose probe takes long are named in the log."""
        farm, began, told = self.farm, time.monotonic(), False
        probes = [asyncio.create_task(farm.work.probe(server.connection)) for server in self.servers]
        try:
            late: set[asyncio.Task[Any]] = set(probes)
            while late:
                _, late = await asyncio.wait(late, timeout=min(farm.look_every, farm.say_after))
                farm.on_look()
                if late and not told and (told := time.monotonic() - began >= farm.say_after):
                    for server in [one for one, probe in zip(self.servers, probes, strict=True) if probe in late]:
                        log.warning("waiting for %s, which does not answer yet", server.connection.address)
            return await asyncio.gather(*probes, return_exceptions=True)
        finally:
            for probe in probes:
                probe.cancel()

    async def close(self) -> None:
        """Cancel all requests and probes that are under way."""
        tasks: list[asyncio.Task[Any]] = [task for server in self.servers for task in server.jobs]
        tasks += [*self.revivals, *self.watches]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()

    async def some(self) -> list[Any]:
        """The outcomes that are ready: at least one, or none if everything has been answered."""
        while True:
            self.farm.on_look()
            if given_up := self._with_nobody_else():
                return given_up
            self._assign()
            jobs = {task: server for server in self.servers for task in server.jobs}
            if not jobs and not self.waiting:
                if not self.farm.more():
                    return []
                self._heard = time.monotonic()  # nobody was asked
            self._require_somebody()
            tasks: list[asyncio.Task[Any]] = [*jobs, *self.revivals, *self.watches]
            done, _ = await asyncio.wait(tasks, timeout=self.farm.look_every, return_when=asyncio.FIRST_COMPLETED)
            outcomes = [
                outcome
                for task in done
                # A server that was just taken out in this loop has no jobs any more.
                if task in jobs and task in jobs[task].jobs and (outcome := self._outcome(jobs[task], task))
            ]
            for task in done & self.revivals.keys():
                self._let_in(self.revivals.pop(task), task.result())
            for task in done & self.watches.keys():
                self._take_out(self.watches.pop(task), "it does not answer its health check")
            if outcomes:
                return outcomes

    def say(self) -> None:
        """Log each server's counts of answers and failed exchanges."""
        for server in self.servers:
            log.info(
                "%s: %d answers%s, %d failed exchanges, %d requests at once",
                server.connection.address,
                server.answers,
                "".join(f", {count} of them {remark}" for remark, count in server.remarks.items()),
                server.faults,
                server.level.value,
            )

    def _assign(self) -> None:
        while (found := self._next()) is not None:
            job, servers = found
            others = [server for server in servers if server is not job.last] or servers
            server = min(others, key=lambda server: len(server.jobs) / server.level.value)
            if not server.jobs and time.monotonic() - server.heard > self.farm.idle:
                self._doubt(server)
                self.waiting.appendleft(job)
                continue
            job.last = server
            if not server.jobs:
                server.heard = time.monotonic()
            server.jobs[asyncio.create_task(self._ask(server, job))] = job

    def _next(self) -> tuple[Job, list[Member]] | None:
        """The next request, and the servers that may be asked. None if there is nothing to ask now."""
        free = [server for server in self.servers if server.room > 0]
        for job in self.waiting:
            if servers := [server for server in free if server is not job.refused_by]:
                self.waiting.remove(job)
                return job, servers
        # A server that refuses everything at once would use up the whole source before another server has answered.
        trusted = [server for server in free if server.room > server.doubts]
        request = next(self.hand_out(), None) if trusted else None
        return None if request is None else (Job(request), trusted)

    async def _ask(self, server: Member, job: Job) -> Any:
        served = server.served
        assert served is not None
        await asyncio.sleep(job.wait)
        return await self.farm.work.ask(server.connection, served, job.request)

    def _outcome(self, server: Member, task: asyncio.Task[Any]) -> Any:
        job = server.jobs.pop(task)
        now = server.heard = time.monotonic()
        try:
            answer = task.result()
        except Refusal as error:
            return self._refused(server, job, error)
        except Fault as error:
            return self._failed(server, job, error)
        self._heard = now
        if job.refused_by is not None:
            self._blame(job.refused_by, job)
        server.strikes, server.answers = 0, server.answers + 1
        remark = self.farm.work.remark(answer)
        server.remarks.update([] if remark is None else [remark])
        server.level.answered(self.farm.work.tokens(answer), now)
        return answer

    def _refused(self, server: Member, job: Job, refusal: Refusal) -> Unanswered | None:
        if job.refused_by is None and self._others(server):
            job.refused_by, job.refusal = server, refusal
            server.doubts += 1
            self.waiting.append(job)
            return None
        return self._given_up(job, _does_not_take(server, refusal), refusal)

    def _blame(self, server: Member, job: Job) -> None:
        """Count a fault of a server that refused a request which another server has answered."""
        reason = f"it does not take what another server answers: {job.refusal}"
        log.debug("%s: %s: %s", server.connection.address, job.request.id, reason)
        server.doubts, server.faults, server.strikes = server.doubts - 1, server.faults + 1, server.strikes + 1
        self.farm.on_fault(Fault(Kind.BAD, reason))
        if server.strikes >= _STRIKES and server.served is not None:
            self._take_out(server, reason)

    def _others(self, server: Member) -> list[Member]:
        """The servers beside this one that are in, or are probed after a pause and may be in again at once."""
        return [other for other in self.servers if other is not server and not other.out]

    def _with_nobody_else(self) -> list[Unanswered]:
        """Give up the requests that were refused by the only server that is still in use."""
        found = []
        for job, server, refusal in [(job, job.refused_by, job.refusal) for job in self.waiting]:
            if server and refusal and server.served is not None and not self._others(server):
                self.waiting.remove(job)
                found.append(self._given_up(job, _does_not_take(server, refusal), refusal))
        return found

    def _given_up(self, job: Job, reason: str, cause: Exception) -> Unanswered:
        if job.refused_by is not None:
            job.refused_by.doubts -= 1
        return Unanswered(id=job.request.id, reason=reason, cause=cause)

    def _failed(self, server: Member, job: Job, fault: Fault) -> Unanswered | None:
        log.debug("%s: %s: %s", server.connection.address, job.request.id, fault.reason)
        server.faults, server.why = server.faults + 1, fault.reason
        self.farm.on_fault(fault)
        job.wait = max(fault.wait, self._pause(job.pauses))
        job.pauses += 1
        if fault.kind is Kind.BUSY:
            server.level.busy()
        elif fault.kind is not Kind.DOWN:
            job.attempts += 1
            server.strikes += 1
        given_up = job.attempts >= _ATTEMPTS
        if not given_up:
            self.waiting.append(job)
        if fault.kind in (Kind.DOWN, Kind.DIED, Kind.WRONG) or server.strikes >= _STRIKES:
            self._take_out(server, fault.reason, died=fault.kind is Kind.DIED)
        if not given_up:
            return None
        return self._given_up(job, f"asked {_ATTEMPTS} times: {fault.reason}", fault)

    def _take_out(self, server: Member, reason: str, *, died: bool = False) -> None:
        if server not in self.revivals.values():
            self._say_out(server, reason)
        server.served, server.strikes = None, 0
        for task, job in list(server.jobs.items()):
            if not task.done():
                task.cancel()
                del server.jobs[task]
                # One of these requests may have caused the server's end.
                job.attempts = min(job.attempts + died, _ATTEMPTS - 1)
                job.wait = 0.0
                self.waiting.append(job)
        self._end_watch(server)
        if server not in self.revivals.values():
            self.revivals[asyncio.create_task(self._revive(server))] = server

    def _say_out(self, server: Member, reason: str) -> None:
        server.out, server.why = True, reason
        log.warning("%s is out: %s; it is let in again when it answers", server.connection.address, reason)

    def _end_watch(self, server: Member) -> None:
        for watch in [watch for watch, watched in self.watches.items() if watched is server]:
            watch.cancel()
            del self.watches[watch]

    def _doubt(self, server: Member) -> None:
        """Probe a server that was idle for long. It may have been replaced, and no failed request would show it."""
        server.served = None
        self._heard = time.monotonic()  # nobody was asked
        self._end_watch(server)
        self.revivals[asyncio.create_task(self._revive(server, at_once=True))] = server

    def _let_in(self, server: Member, served: Any) -> None:
        if server.out:
            again = " again" if server.answers or server.faults else ""
            log.warning("%s is in%s", server.connection.address, again)
        log.info("%s serves %s", server.connection.address, self.farm.work.describe(served))
        server.served, server.out, server.heard = served, False, time.monotonic()
        server.level = Level(self.farm.work.wanted.max_concurrency)
        self.watches[asyncio.create_task(self._watch(server))] = server

    async def _revive(self, server: Member, said: str = "", *, at_once: bool = False) -> Any:
        tries = 0
        while True:
            await asyncio.sleep(0 if at_once and not tries else self._pause(tries))
            tries += 1
            try:
                return await self.farm.work.probe(server.connection)
            except Fault as error:
                if not server.out:
                    self._say_out(server, error.reason)
            except NotServed as error:
                server.out, server.why = True, error.problem
                if str(error) != said:
                    said = str(error)
                    log.warning("%s stays out: %s", server.connection.address, error)

    async def _watch(self, server: Member) -> None:
        """Returns when a server that has been silent fails two health checks."""
        every, failed = self.farm.health_every, 0
        while failed < 2:
            await asyncio.sleep(every)
            silent = server.jobs and time.monotonic() - server.heard >= every
            failed = failed + 1 if silent and not await server.connection.alive(seconds=every) else 0

    def _pause(self, tries: int) -> float:
        """A pause that doubles with each try, with a random spread, so that failed requests do not retry together."""
        return min(_LONGEST_PAUSE, self.farm.pause * 2.0 ** min(tries, 16)) * random.uniform(0.5, 1.0)

    def _require_somebody(self) -> None:
        if any(server.served is not None for server in self.servers):
            patience = 2 * self.farm.work.wanted.timeout + _LONGEST_PAUSE
        else:
            patience = self.farm.work.wanted.timeout
        if time.monotonic() - self._heard > patience:
            raise DataError(
                "No server answers any more",
                where=self.farm.work.wanted.called.servers,
                found="; ".join(f"{server.connection.address}: {server.why}" for server in self.servers),
                expected=f"an answer within {patience:g} s ({self.farm.work.wanted.called.timeout})",
                fix="Start them and run again: the answers that are there are kept.",
            )


def _does_not_take(server: Member, refusal: Refusal) -> str:
    return f"{server.connection.address} does not take it: {refusal}"
