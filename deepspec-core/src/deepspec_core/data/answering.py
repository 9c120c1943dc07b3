"""The contract of answerers: regeneration gives them requests and receives answers.

An answerer returns answers as they finish, in any order. The target in this process is one answerer; servers
(servers/farm.py) are another. Knows requests and completions; knows no conversations and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from attrs import frozen

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetFeatures, TargetModel
from deepspec_core.decoding.engine import Completion, Request, decode


@frozen(kw_only=True)
class Turn(Request):
    """A request of a conversation. `ends`: no further question of the conversation is ahead."""

    ends: bool = True


@frozen(kw_only=True, eq=False)
class Answer:
    """A finished answer.

    mismatched: Its ids were made from text, and their number is not what the server counted.
    features: [T, C] and [T, H] of its prompt and of all of itself, where they came with it.
    lacks: Why they did not, where they were asked for.
    """

    completion: Completion
    mismatched: bool = False
    features: TargetFeatures | None = None
    lacks: str | None = None


@frozen(kw_only=True)
class Unanswered:
    """A request that no server could answer, with the reason in words. `cause` is the last error."""

    id: str
    reason: str
    cause: Exception | None = None


HandOut = Callable[[], Iterator[Request]]
"""Gives the requests that can be handed out now; it is asked again after answers, which may bring further turns."""

Answerer = Callable[[HandOut], Iterator[Answer | Unanswered]]


def in_process(
    target: TargetModel,
    *,
    sampling: Sampling,
    stop_ids: Sequence[int],
    max_tokens: int,
    batch_size: int,
    max_length: int,
) -> Answerer:
    """The target in this process answers, `batch_size` requests at once."""

    def answer(hand_out: HandOut) -> Iterator[Answer]:
        asked = True
        while asked:
            asked = False
            for completion in decode(
                target,
                None,
                hand_out(),
                sampling=sampling,
                stop_ids=stop_ids,
                max_new_tokens=max_tokens,
                batch_size=batch_size,
                max_length=max_length,
            ):
                asked = True
                yield Answer(completion=completion)

    return answer
