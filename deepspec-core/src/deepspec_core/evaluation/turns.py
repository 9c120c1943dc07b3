"""The later turns of prompts: what the user says next, after the answers that were really given.

Knows how a conversation goes on. Does not know how it is decoded; each decoding goes on with its own answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from attrs import frozen

from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.errors import DataError
from deepspec_core.evaluation.tasks import Prompt

_MARK = " (turn "


@frozen(kw_only=True)
class LaterTurns:
    """Asks the turns after the first. `prompts` are by id; `positions` is the target's number of positions."""

    prompts: Mapping[str, Prompt]
    tokenizer: ChatTokenizer
    system_prompt: str | None
    stop_ids: tuple[int, ...]
    positions: int
    seed: int

    def next(self, identity: str, answers: Sequence[Completion]) -> Request | None:
        """The turn after these answers. None if it was the last one, or if the next cannot be asked.

        It cannot where the conversation fills the target's positions, or the template refuses an answer, such as one
        with a control token in its text.
        """
        prompt = self.prompts[identity]
        if len(answers) > len(prompt.later):
            return None
        messages = list(prompt.messages)
        for answer, said in zip(answers, prompt.later, strict=False):
            output = answer.output_ids
            text_ids = output[:-1] if output and output[-1] in self.stop_ids else output
            messages += [{"role": "assistant", "content": self.tokenizer.decode(text_ids)}, *said]
        try:
            prompt_ids = self.tokenizer.render_prompt(messages, self.system_prompt, prompt.tools)
        except DataError:
            return None
        if len(prompt_ids) >= self.positions:
            return None
        return Request(
            id=f"{identity}{_MARK}{len(answers) + 1})",
            prompt_ids=prompt_ids,
            seed=_seed(self.seed, prompt.index, len(answers)),
        )

    def number(self, identity: str) -> int:
        """How many turns the prompt has after its first."""
        return len(self.prompts[identity].later)


def prompt_of(identity: str) -> str:
    """The id of the prompt that a turn belongs to."""
    return identity.rpartition(_MARK)[0] or identity


def _seed(seed: int, index: int, turn: int) -> int:
    """A later turn's own seed: neither other prompts nor what was answered matter."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, index, turn]).encode()).digest()[:8], "big")
