"""A conversation that the target answers turn by turn: the messages so far, and the messages before the next answer.

The source's assistant messages are left out. Recorded tool results are kept: as many as one of the source's answers
requested are replayed when the target calls a tool too. Knows messages; knows neither tokens nor who answers.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from attrs import define, field

if TYPE_CHECKING:
    from deepspec_core.data.conversations import Conversation
    from deepspec_core.decoding.engine import Completion

Messages = list[dict[str, Any]]


@define
class Dialogue:
    """A running conversation: `history` holds the messages so far; `ahead` those to add before each further answer."""

    conversation: Conversation
    ahead: deque[Messages] = field(init=False)
    history: Messages = field(factory=list)
    turns: list[Completion] = field(factory=list)
    mismatched: int = 0

    def __attrs_post_init__(self) -> None:
        self.ahead = deque(_steps(self.conversation))

    @property
    def questions_ahead(self) -> int:
        """The user's messages to come."""
        return sum(_is_question(messages) for messages in self.ahead)

    @property
    def skipped_results(self) -> int:
        """The recorded tool results that were not replayed."""
        return _results(self.conversation.messages) - _results(self.history)

    def goes_on(self, *, called: bool) -> bool:
        """Whether further messages follow an answer. `called`: The answer calls a tool.

        If it does not, the recorded tool results that follow it are left out.
        """
        while self.ahead and not called and not _is_question(self.ahead[0]):
            self.ahead.popleft()
        return bool(self.ahead)

    def say_next(self) -> None:
        """Add the messages that come before the next answer to the history."""
        self.history += self.ahead.popleft()

    def end_with_an_answer(self) -> None:
        """Remove the messages after the last answer."""
        while self.history[-1]["role"] != "assistant":
            self.history.pop()


def has_results(conversation: Conversation) -> bool:
    """Whether tools gave results in it."""
    return _results(conversation.messages) > 0


def _results(messages: Any) -> int:
    return sum(message["role"] == "tool" for message in messages)


def _is_question(messages: Messages) -> bool:
    return bool(messages[-1]["role"] == "user")


def _steps(conversation: Conversation) -> list[Messages]:
    """Everything up to a user's message, or the results between two of the assistant's."""
    steps: list[Messages] = []
    said: Messages = []
    results: Messages = []
    for message in conversation.messages:
        if message["role"] == "tool":
            results.append(message)
            continue
        if results:
            steps.append(results)
            results = []
        if message["role"] == "assistant":
            continue
        said.append(message)
        if message["role"] == "user":
            steps.append(said)
            said = []
    return [*steps, results] if results else steps
