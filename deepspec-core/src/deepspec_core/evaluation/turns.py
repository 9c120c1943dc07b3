"""The later turns of prompts: what the user says next, after the answers that were really given.

Knows how a conversation goes on. Does not know how it is decoded; each decoding goes on with its own answers.
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
    """Asks the turns after the first. `prompts` are by id; `positions` is the target's number of positions.

    `stop_text` is what ended answers: the user was not shown what follows.
    """

    prompts: Mapping[str, Prompt]
    tokenizer: ChatTokenizer
    system_prompt: str | None
    stop_ids: tuple[int, ...]
    positions: int
    seed: int
    stop_text: StopText | None = None

    def next(self, identity: str, answers: Sequence[Completion]) -> Request | None:
        """The turn after these answers. None if it was the last one, or if the next cannot be asked.

        It cannot where the conversation fills the target's positions, or the template refuses an answer, such as one
        with a control token in its text.
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
        """The answer as the user was shown it."""
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
    """The number of a further sample; none of the first."""
    number = _parts(identity)["sample"]
    return [] if number is None else [int(number)]


def _seed(*of: int) -> int:
    """A later turn's own seed, of the prompt's place, the turn and the sample: no neighbour and no answer matters."""
    return int.from_bytes(hashlib.sha256(json.dumps(of).encode()).digest()[:8], "big")
