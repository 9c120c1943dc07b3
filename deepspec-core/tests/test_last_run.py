"""Ctrl-C at the moment when a call of an event loop is done: what cleans up runs to its end."""

import asyncio

import pytest

from deepspec_core.servers.last_run import run_last


def interrupted(runner: asyncio.Runner) -> None:
    """A call that is done, and is interrupted before the loop has stopped."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def call() -> None:
        asyncio.get_running_loop().call_soon(interrupt)

    with pytest.raises(KeyboardInterrupt):
        runner.run(call())


async def clean_up(done: list[str]) -> None:
    await asyncio.sleep(0.001)
    done.append("cleaned up")


def test_it_runs_to_its_end_after_an_interrupt() -> None:
    done: list[str] = []
    with asyncio.Runner() as runner:
        interrupted(runner)
        run_last(runner, clean_up(done))
    assert done == ["cleaned up"]


def test_it_runs_where_nothing_was_interrupted_and_where_nothing_ran() -> None:
    done: list[str] = []
    for before in (True, False):
        with asyncio.Runner() as runner:
            if before:
                runner.run(clean_up(done))
            run_last(runner, clean_up(done))
    assert len(done) == 3
