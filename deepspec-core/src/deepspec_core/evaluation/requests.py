"""Turns the prompts of a task into requests: rendered, with seeds, and without prompts that cannot be answered.

This file knows prompts and the chat template. It does not know where tasks come from, models or decoding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from attrs import evolve

from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Request
from deepspec_core.errors import DataError
from deepspec_core.evaluation.group_decoding import Failure
from deepspec_core.evaluation.tasks import Prompt
from deepspec_core.evaluation.turns import sample_id


class Askable(NamedTuple):
    """The requests of a task's prompts, how many are too long to be answered, and those that cannot be asked."""

    requests: list[Request]
    too_long: int
    refused: tuple[Failure, ...]


def requests_of_prompts(
    prompts: Sequence[Prompt],
    tokenizer: ChatTokenizer,
    *,
    system_prompt: str | None,
    seed: int,
    room: int,
    task: str,
    max_failures: float = 0.0,
) -> Askable:
    """The requests that leave the target room to answer, and the prompts that are too long or cannot be asked.

    `room` is the target's number of positions. Prompt i is decoded with `seed` + i, whichever prompts come before it.
    Raises DataError if no prompt can be asked, or if the template refuses a larger share of the prompts than
    `max_failures`. This is known before anything is decoded, so the share applies to small tasks too.
    """
    rendered, refused, errors = list[Request](), list[Failure](), list[DataError]()
    for prompt in prompts:
        try:
            ids = _rendered(prompt, tokenizer, system_prompt)
        except DataError as error:
            errors.append(error)
            refused.append(Failure(id=prompt.id, reason=f"{error.problem}: {error.found} ({error.where})"))
        else:
            rendered.append(Request(id=prompt.id, prompt_ids=ids, seed=seed + prompt.index))
    if errors and (not rendered or len(errors) > max_failures * len(prompts)):
        first = errors[0]
        if len(errors) == 1:
            raise first
        raise DataError(
            first.problem,
            where=first.where,
            found=f"{first.found}; {len(errors)} of {len(prompts)} prompts of {task} are refused",
            expected=f"{first.expected or ''}{'; ' if first.expected else ''}at most {max_failures:.1%} refused",
            fix=first.fix,
        )
    fitting = [request for request in rendered if len(request.prompt_ids) < room]
    if not fitting:
        raise DataError(
            "Every prompt of a task is too long for the target",
            where=task,
            found=f"the shortest has {min(len(request.prompt_ids) for request in rendered)} tokens",
            expected=f"fewer than {room}",
        )
    return Askable(fitting, len(rendered) - len(fitting), tuple(refused))


def _rendered(prompt: Prompt, tokenizer: ChatTokenizer, system_prompt: str | None) -> tuple[int, ...]:
    """The prompt's token ids. Raises DataError, which names the prompt's row, if the template refuses it."""
    try:
        return tokenizer.render_prompt(prompt.messages, system_prompt, prompt.tools)
    except DataError as error:
        where = error.where or prompt.where or prompt.id
        raise DataError(
            error.problem, where=where, found=error.found, expected=error.expected, fix=error.fix
        ) from error


def repeated(requests: Sequence[Request], samples: int) -> list[Request]:
    """This many samples of each request, one after the other.

    The first sample is the request itself. The seed of a further one follows from the request's seed and its number.
    """
    return [
        request if number == 1 else evolve(request, id=sample_id(request.id, number), seed=_seed(request.seed, number))
        for request in requests
        for number in range(1, samples + 1)
    ]


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, "sample", number]).encode()).digest()[:8], "big")
