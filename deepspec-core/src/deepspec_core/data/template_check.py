"""Whether a chat template can be used at all, before anything is rendered for training or decoding.

Two turns are asked and answered. A template that fails these fails every row, or every conversation of two turns, and
would do so in the middle of a stage. Knows what an answer needs; not which rows come.
"""

from __future__ import annotations

from typing import Final

from deepspec_core.contracts.target import ConversationFormat
from deepspec_core.data.answers import Messages, TemplateRefusal
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.left_out import LeftOut
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.errors import DataError

_TURNS: Final = (
    {"role": "user", "content": "zqaqz"},
    {"role": "assistant", "content": "zqbqz"},
    {"role": "user", "content": "zqcqz"},
    {"role": "assistant", "content": "zqdqz"},
)


def check_template(tokenizer: ChatTokenizer, fmt: ConversationFormat, *, where: object) -> None:
    """Raise DataError, saying `where`, if the template's renderings do not fit `fmt`, or leave out plain answers.

    If the template refuses a conversation with a message of its own, this says nothing about others and is no error.
    """
    for turns in (_TURNS[:2], _TURNS):
        try:
            _check_prompt(tokenizer, turns[:-1], fmt)
            tokenizer.answers(Conversation(id="", messages=turns), fmt, None)
        except DataError as error:
            if isinstance(error, TemplateRefusal) and not isinstance(error, LeftOut):
                continue
            fix = error.fix or "Choose a template that renders conversations as this target's family does."
            raise DataError(error.problem, where=where, found=error.found, expected=error.expected, fix=fix) from error


def _check_prompt(tokenizer: ChatTokenizer, messages: Messages, fmt: ConversationFormat) -> None:
    prompt = tokenizer.render(messages, None, prompt=True)
    last = prompt.rfind(messages[-1]["content"])
    if last < 0 or fmt.assistant_start in prompt[last:]:
        return  # another check reports a message that is left out
    ignored = prompt == tokenizer.render(messages, None, prompt=False)
    raise DataError(
        "The chat template ignores add_generation_prompt"
        if ignored
        else "The chat template and the family's conversation format disagree",
        found=repr(prompt[-60:]) + " before an answer",
        expected=repr(fmt.assistant_start),
        fix=f"Change the template: if add_generation_prompt is true, it must end with {fmt.assistant_start!r}.",
    )
