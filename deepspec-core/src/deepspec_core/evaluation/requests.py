"""Turns the prompts of a task into requests: rendered, with seeds, and without prompts that leave no room to answer.

Knows prompts and the chat template. Does not know the sources of tasks, models or decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Request
from deepspec_core.errors import DataError
from deepspec_core.evaluation.tasks import Prompt


def requests_of_prompts(
    prompts: Sequence[Prompt], tokenizer: ChatTokenizer, *, system_prompt: str | None, seed: int, room: int, task: str
) -> tuple[list[Request], int]:
    """The requests that leave the target room to answer, and the number of prompts that do not. DataError if none does.

    `room` is the target's number of positions. Prompt i is decoded with `seed` + i, whichever prompts come before it.
    """
    rendered = [
        Request(id=prompt.id, prompt_ids=_rendered(prompt, tokenizer, system_prompt), seed=seed + prompt.index)
        for prompt in prompts
    ]
    fitting = [request for request in rendered if len(request.prompt_ids) < room]
    if not fitting:
        raise DataError(
            "Every prompt of a task is too long for the target",
            where=task,
            found=f"the shortest has {min(len(request.prompt_ids) for request in rendered)} tokens",
            expected=f"fewer than {room}",
        )
    return fitting, len(rendered) - len(fitting)


def _rendered(prompt: Prompt, tokenizer: ChatTokenizer, system_prompt: str | None) -> tuple[int, ...]:
    """The prompt's token ids; DataError, saying the prompt's row, where the template does not take it."""
    try:
        return tokenizer.render_prompt(prompt.messages, system_prompt, prompt.tools)
    except DataError as error:
        where = error.where or prompt.where or prompt.id
        raise DataError(
            error.problem, where=where, found=error.found, expected=error.expected, fix=error.fix
        ) from error
