"""The later turns of prompts: renders the user's next messages after the answers that were decoded before.

This file knows how a conversation goes on. It does not know how it is decoded. Plain and speculative decoding each
continue with their own answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from attrs import frozen

from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.decoding.stop_text import StopText
from deepspec_core.errors import DataError
from deepspec_core.evaluation.tasks import Prompt

_NAMES = re.compile(r"(?P<prompt>.*?)(?: \(sample (?P<sample>\d+)\))?(?P<turn> \(turn \d+\))?", re.DOTALL)


@frozen(kw_only=True)
class LaterTurns:
    """Makes the requests of the turns after the first. `prompts` are by id; `positions` is the target's number of them.

    `stop_text` cuts answers where a stop text ended them, because the user was not shown the rest.
    """

    prompts: Mapping[str, Prompt]
    tokenizer: ChatTokenizer
    system_prompt: str | None
    stop_ids: tuple[int, ...]
    positions: int
    seed: int
    stop_text: StopText | None = None

    def next(self, identity: str, answers: Sequence[Completion]) -> Request | None:
        """The request of the turn after these answers. None if there is no further turn, or if it cannot be asked.

        It cannot be asked if the conversation fills the target's positions, or if the template refuses an answer, for
        example one whose text contains a control token.
        """
        prompt = self.prompts[prompt_of(identity)]
        if len(answers) > len(prompt.later):
            return None
        messages = list(prompt.messages)
        for answer, said in zip(answers, prompt.later, strict=False):
            output = answer.output_ids
            text_ids = output[:-1] if output and output[-1] in self.stop_ids else output
            messages += [{"role": "assistant", "content": self._said(text_ids)}, *said]
        try:
            prompt_ids = self.tokenizer.render_prompt(messages, self.system_prompt, prompt.tools)
        except DataError:
            return None
        if len(prompt_ids) >= self.positions:
            return None
        return Request(
            id=f"{identity} (turn {len(answers) + 1})",
            prompt_ids=prompt_ids,
            seed=_seed(self.seed, prompt.index, len(answers), *_sample(identity)),
        )

    def number(self, identity: str) -> int:
        """How many turns the prompt has after its first."""
        return len(self.prompts[prompt_of(identity)].later)

    def _said(self, ids: Sequence[int]) -> str:
        """The text of the answer as the user saw it."""
        text = self.tokenizer.decode(ids)
        return text if self.stop_text is None else self.stop_text.cut(text)


def sample_id(identity: str, number: int) -> str:
    """The id of a further sample of a prompt."""
    return f"{identity} (sample {number})"


def prompt_of(identity: str) -> str:
    """The id of the prompt that a sample, or a turn, belongs to."""
    return _parts(identity)["prompt"] or identity


def first_turn_of(identity: str) -> str:
    """The id of the first turn of a turn's conversation."""
    return identity.removesuffix(_parts(identity)["turn"] or "") or identity


def _parts(identity: str) -> dict[str, str | None]:
    found = _NAMES.fullmatch(identity)
    assert found is not None, "the pattern fits every text"
    return found.groupdict()


def _sample(identity: str) -> list[int]:
    """The number of a further sample, in a list; empty for the first sample."""
    number = _parts(identity)["sample"]
    return [] if number is None else [int(number)]


def _seed(*of: int) -> int:
    """The seed of a later turn. It depends on the prompt's index, the turn and the sample, and on no answer."""
    return int.from_bytes(hashlib.sha256(json.dumps(of).encode()).digest()[:8], "big")
