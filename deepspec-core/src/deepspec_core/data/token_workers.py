"""Several processes that tokenise conversations, a chunk at a time, with a bounded number of chunks on their way.

A process ends with the one that started it, however that one ends. Knows processes and chunks; not how a conversation
becomes tokens.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Final

import torch

from deepspec_core.contracts.draft import Sample
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.tokenizing import CHUNK, Outcome, Tokenisation
from deepspec_core.errors import DataError

_AHEAD: Final = 3  # chunks a process: one in work, one waiting, one on its way back

_ours: Tokenisation | None = None

# A sample as it is sent: tensors would be sent as open files, of which a process may not have so many.
_Sent = tuple[tuple[tuple[str, Any, Any, int], ...], bool, tuple[str, str] | None, tuple[Any, ...] | None]


def in_processes(
    conversations: Iterable[Conversation], tokenisation: Tokenisation, processes: int
) -> Iterator[tuple[Conversation, Outcome]]:
    """Each conversation with its outcome, in order. Raises DataError if a process dies."""
    rest = iter(conversations)
    pool = ProcessPoolExecutor(
        processes,
        # A fork would copy the threads' locks of torch and of the tokenizer as they happen to be.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(tokenisation,),
    )
    try:
        pending: deque[tuple[list[Conversation], Future[list[_Sent]]]] = deque()
        while True:
            while len(pending) < _AHEAD * processes and (chunk := list(islice(rest, CHUNK))):
                pending.append((chunk, pool.submit(_tokenise, chunk)))
            if not pending:
                return
            chunk, future = pending.popleft()
            for conversation, sent in zip(chunk, future.result(), strict=True):
                yield conversation, _received(sent)
    except BrokenProcessPool as error:
        raise DataError(
            "A process that tokenised conversations has died",
            found="it was killed, ran out of memory, or ran your own script from the beginning",
            fix="Run again: it continues from the stored tokens. Lower data.workers if memory is "
            "short. A script of your "
            'own must start its work below `if __name__ == "__main__":`, because each process reads the script again.',
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(tokenisation: Tokenisation) -> None:
    global _ours
    faulthandler.enable(2)  # what ends it without an exception at least says where it was
    _ours = tokenisation
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer's own threads: here a process is one core's
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its processes
    parent = multiprocessing.parent_process()
    assert parent is not None, "a spawned process"

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def _tokenise(chunk: list[Conversation]) -> list[_Sent]:
    assert _ours is not None, "_begin comes first"
    return [_sent(outcome) for outcome in _ours(chunk)]


def _sent(outcome: Outcome) -> _Sent:
    error = outcome.error
    samples = tuple(
        (one.id, one.input_ids.to(torch.int32).numpy(), one.loss_mask.numpy(), one.original_length)
        for one in outcome.samples
    )
    told = None if error is None else (error.problem, _text(error.found), _text(error.expected))
    return samples, outcome.joined_start, outcome.dropped, told


def _text(part: object) -> str | None:
    return None if part is None else str(part)


def _received(sent: _Sent) -> Outcome:
    samples, joined_start, dropped, error = sent
    return Outcome(
        samples=tuple(
            Sample(
                id=identity,
                input_ids=torch.from_numpy(ids).to(torch.int64),
                loss_mask=torch.from_numpy(mask),
                original_length=original_length,
            )
            for identity, ids, mask, original_length in samples
        ),
        joined_start=joined_start,
        dropped=dropped,
        error=None if error is None else DataError(error[0], found=error[1], expected=error[2]),
    )
