"""One server answers prompts while its counters are read: answers, time, and the rounds counted meanwhile.

No other client may use the server at the same time, because its counters cover all of its work. If it counted more
tokens than we received, another client did use it. Knows requests and counters; does not know how they are evaluated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from attrs import define, evolve, field, frozen

from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.errors import ConfigError, StageError
from deepspec_core.servers.connection import Connection, Fault, Kind, Refusal, client, shown
from deepspec_core.servers.counting import Impossible, NoCounters, Reading, Reset, Tally, impossible, reading
from deepspec_core.servers.engines import ENGINES, Engine, engine_of
from deepspec_core.servers.last_run import run_last
from deepspec_core.servers.probe import Served, listed, probe
from deepspec_core.servers.reading import choice_of, has_ids, read
from deepspec_core.servers.wanted import Wanted

# Counters may be written a moment after the answer they are of.
_SETTLE_SECONDS: Final = 5.0
_LOOK_EVERY: Final = 0.1
_SECONDS: Final = 30.0
_BUSY_SECONDS: Final = 60.0
_WARM_UP_TOKENS: Final = 16

Next = Callable[[str, Sequence[Completion]], Request | None]
"""The turn after the answers that a prompt has; None where there is none."""


@frozen(kw_only=True)
class Measured:
    """What one pass over some prompts gave.

    tally: The rounds; None where the server speculates with nothing, or where others asked it too.
    counted: The tokens that the server says its answers have. by_counters: those that its counters have, None where it
        shows none. mismatched: answers whose ids were made from their text, and are not as many as the server counted.
    """

    completions: tuple[Completion, ...]
    wall: float
    tally: Tally | None
    speculates: bool
    counted: int
    by_counters: int | None
    running_before: int
    mismatched: int

    @property
    def disturbed(self) -> bool | None:
        """Whether the server did other work too; None where it shows no counters."""
        if self.by_counters is None:
            return None
        return self.by_counters != self.counted or self.running_before > 0


@define(kw_only=True)
class Server:
    """One server. Use it in a `with` block; entering it asks what it serves, and raises ConfigError where that is not
    the target or it cannot be measured."""

    address: str
    wanted: Wanted
    engine: Engine = field(init=False)
    served: Served = field(init=False)
    _connection: Connection = field(init=False)
    _runner: asyncio.Runner = field(factory=asyncio.Runner, init=False)
    _stack: AsyncExitStack = field(factory=AsyncExitStack, init=False)

    def __enter__(self) -> Server:
        try:
            self._runner.run(self._open())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            run_last(self._runner, self._stack.aclose())
        finally:
            self._runner.close()

    def measure(
        self, requests: Sequence[Request], *, at_once: int, wanted: Wanted, following: Next, done: Callable[[], None]
    ) -> Measured:
        """Ask every request, `at_once` of them at a time, and their later turns. `done` is called after each prompt.

        StageError where an answer cannot be used, or the counters do not cover the answers or cannot be.
        """
        return self._runner.run(self._measure(requests, at_once, wanted, following, done))

    async def _open(self) -> None:
        shared = await self._stack.enter_async_context(client(self.wanted.key))
        self._connection = Connection(self.address, shared)
        try:
            models, said = await listed(self._connection, self.wanted)
            engine = engine_of(models)
            if engine is None:
                raise ConfigError(
                    "Speculative decoding cannot be measured on this kind of server",
                    where=self._where,
                    found="; ".join(said) or f"models of {', '.join(sorted({str(m.get('owned_by')) for m in models}))}",
                    expected=" or ".join(one.name for one in ENGINES),
                    fix="Give the address of the engine itself, like http://host:8000, not that of a gateway.",
                )
            self.engine = engine
            self.served = await probe(self._connection, self.wanted, dialects=(engine.dialect,))
            if not engine.tells_in_answers:
                await self._reading()
        except Fault as fault:
            raise ConfigError(
                "The server does not answer",
                where=self._where,
                found=fault.reason,
                fix="Start the server, or correct the address.",
            ) from None

    async def _measure(
        self,
        requests: Sequence[Request],
        at_once: int,
        wanted: Wanted,
        following: Next,
        done: Callable[[], None],
    ) -> Measured:
        warm = evolve(wanted, max_tokens=min(_WARM_UP_TOKENS, wanted.max_tokens))
        await self._ask(requests[0], warm)
        before = await self._settled()
        start = time.perf_counter()
        asked = await self._all(requests, at_once, wanted, following, done)
        wall = time.perf_counter() - start
        answers = [answer for several in asked for answer in several]
        counted = sum(answer.counted for answer in answers)
        counters = None if before is None else await self._since(before, counted)
        tally = _told(answers) if self.engine.tells_in_answers else counters.tally if counters is not None else None
        speculates = tally is not None and tally.rounds > 0
        measured = Measured(
            completions=tuple(answer.completion for answer in answers),
            wall=wall,
            tally=tally if speculates else None,
            speculates=speculates,
            counted=counted,
            by_counters=None if counters is None else counters.generated,
            running_before=0 if before is None else before.running,
            mismatched=sum(answer.mismatched for answer in answers),
        )
        # What answers tell of themselves is of nobody else.
        spoiled = measured.disturbed and not self.engine.tells_in_answers
        if spoiled:
            return evolve(measured, tally=None)
        if self.engine.tells_in_answers:
            for answer in answers:
                # It verifies in every step but the first, which the prompt's own pass gives.
                self._refuse(answer.tally, at_least=len(answer.completion.output_ids) - 1, may_be_idle=not speculates)
        else:
            # Steps without a proposal are no rounds there, so its rounds may give fewer tokens than the answers have.
            self._refuse(tally)
        return measured

    def _refuse(self, tally: Tally | None, *, at_least: int = 0, may_be_idle: bool = True) -> None:
        if tally is None or (may_be_idle and tally.rounds == 0 == tally.accepted):
            return
        if (why := impossible(tally, at_least=at_least)) is not None:
            raise self._contradicting(why)

    async def _all(
        self,
        requests: Sequence[Request],
        at_once: int,
        wanted: Wanted,
        following: Next,
        done: Callable[[], None],
    ) -> list[list[_Answered]]:
        free = asyncio.Semaphore(at_once)

        async def prompt(request: Request) -> list[_Answered]:
            answers: list[_Answered] = []
            async with free:
                turn: Request | None = request
                while turn is not None:
                    answers.append(await self._ask(turn, wanted))
                    turn = following(request.id, [answer.completion for answer in answers])
            done()
            return answers

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(prompt(request)) for request in requests]
        except ExceptionGroup as failed:
            # Every one of them says why it failed; the first is enough.
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, request: Request, wanted: Wanted) -> _Answered:
        dialect = self.served.dialect
        body = dialect.body(
            wanted,
            model=self.served.model,
            prompt_ids=request.prompt_ids,
            limit=wanted.limit(request.prompt_ids),
            seed=request.seed,
        )
        waited = 0.0
        try:
            while True:
                try:
                    sent = await self._connection.complete(body, seconds=wanted.timeout, path=dialect.path)
                    break
                except Fault as fault:
                    if fault.kind is not Kind.BUSY or waited >= _BUSY_SECONDS:
                        raise
                    pause = max(fault.wait, 1.0)
                    waited += pause
                    await asyncio.sleep(pause)
            content = dialect.in_form(sent, body)
            answer = read(content, request, wanted, model=self.served.model)
            choice = choice_of(content, self.served.model)
            if has_ids(choice) and len(choice["token_ids"]) > len(answer.completion.output_ids):
                raise Fault(Kind.WRONG, "it goes on after a token that ends the target's answers")
            return _Answered(
                completion=answer.completion,
                counted=_count(content, answer.completion),
                tally=self.engine.tally(sent),
                mismatched=answer.mismatched,
            )
        except (Fault, Refusal) as error:
            raise StageError(
                "The server did not answer a prompt, so its counters do not match the answers",
                where=f"{self._where}: {request.id}",
                found=str(error),
                fix="Correct the cause and run the command again: nothing was written.",
            ) from None

    async def _reading(self) -> Reading:
        """The counters now. ConfigError where the server shows none."""
        found = ""
        try:
            text = await self._connection.text("/metrics", seconds=_SECONDS)
            return reading(text, self.engine.counters)
        except Impossible as error:
            raise self._contradicting(str(error)) from None
        except NoCounters:
            found = f"no {self.engine.counters.generated} in {shown(text)}"
        except Refusal as error:
            found = str(error)
        except Fault as fault:
            if fault.kind in (Kind.DOWN, Kind.DIED):
                raise
            found = fault.reason
        raise ConfigError(
            "The server does not show its counters",
            where=f"{self._where}: /metrics",
            found=found,
            expected=f"the counters of {self.engine.name}",
            fix=self.engine.shows_counters,
        )

    async def _settled(self) -> Reading | None:
        """The counters after what came before is counted: when two looks in a row agree, or after a while."""
        try:
            now = await self._reading()
            for _ in range(round(_SETTLE_SECONDS / _LOOK_EVERY)):
                await asyncio.sleep(2 * _LOOK_EVERY)
                last, now = now, await self._reading()
                if last == now and now.running == 0:
                    break
        except ConfigError:
            if not self.engine.tells_in_answers:
                raise
            return None
        except Fault as fault:
            raise self._gone(fault) from None
        return now

    async def _since(self, before: Reading, counted: int) -> Reading:
        try:
            for _ in range(round(_SETTLE_SECONDS / _LOOK_EVERY)):
                found = (await self._reading()).since(before)
                if found.generated >= counted:
                    # Rounds may be written a moment after tokens.
                    await asyncio.sleep(2 * _LOOK_EVERY)
                    return (await self._reading()).since(before)
                await asyncio.sleep(_LOOK_EVERY)
        except Fault as fault:
            raise self._gone(fault) from None
        except Reset:
            found = None
        raise StageError(
            "The server's counters restarted during the measurement",
            where=self._where,
            found="lower counters than before, or another process"
            if found is None
            else f"{found.generated:,} generated tokens, where its answers have {counted:,}",
            expected="counters of all its answers",
            fix="Find out why the server restarted, and run the command again: nothing was written.",
        )

    def _gone(self, fault: Fault) -> StageError:
        return StageError(
            "The server has stopped answering",
            where=self._where,
            found=fault.reason,
            fix="Start the server, and run the command again: nothing was written.",
        )

    def _contradicting(self, why: str) -> StageError:
        return StageError(
            "The server's counters contradict each other",
            where=self._where,
            found=why,
            expected="consistent counts of the rounds of one engine",
            fix="Use the address of the engine itself, not that of a proxy that counts differently. "
            "Nothing was written.",
        )

    @property
    def _where(self) -> str:
        return f"{self.wanted.called.servers}: {self.address}"


@frozen(kw_only=True)
class _Answered:
    completion: Completion
    counted: int
    tally: Tally | None
    mismatched: bool


def _told(answers: Sequence[_Answered]) -> Tally | None:
    """The rounds that the answers tell, together; None where an answer that must have some tells none.

    An answer of one token has none, because the prompt's own pass gives that token. It need not say so.
    """
    told = [answer.tally for answer in answers if answer.tally is not None or len(answer.completion.output_ids) > 1]
    tally: Tally | None = None
    for one in told:
        if one is None:
            return None
        tally = one if tally is None else tally.plus(one)
    return tally


def _count(content: dict[str, Any], completion: Completion) -> int:
    """How many tokens the server says the answer has."""
    usage = content.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else len(completion.output_ids)
