"""The last call of an event loop, which also works after Ctrl-C. Knows asyncio's runner; not what is cleaned up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def run_last(runner: asyncio.Runner, coroutine: Coroutine[Any, Any, None]) -> None:
    """Run the coroutine to its end.

    If Ctrl-C comes just when a call of the runner is done, asyncio leaves that call's request to stop in the loop. It
    would stop the next call before its end, with a RuntimeError. So what is ready in the loop is run once before.
    """
    loop = runner.get_loop()
    loop.call_soon(loop.stop)
    loop.run_forever()
    runner.run(coroutine)
