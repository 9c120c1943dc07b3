"""Repeats conversations that are answered several times, with a separate id for each answer.

Answers are sampled with seeds derived from ids, so answers to the same prompt are independent. Knows ids only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import evolve

from deepspec_core.data.conversations import Conversation
from deepspec_core.data.digest_set import DigestSet, digest16


def several(conversations: Iterable[Conversation], answers: int) -> Iterator[Conversation]:
    """Each conversation `answers` times, one after the other: "ID", "ID (answer 2)" and so on.

    The ids are distinct, also where a source has such ids already: one that was there before gets "(again)" after it.
    """
    if answers == 1:
        yield from conversations
        return
    ids = DigestSet()
    for conversation in conversations:
        for number in range(1, answers + 1):
            identity = conversation.id if number == 1 else f"{conversation.id} (answer {number})"
            while not ids.add(digest16(identity)):
                identity = f"{identity} (again)"
            yield evolve(conversation, id=identity)
