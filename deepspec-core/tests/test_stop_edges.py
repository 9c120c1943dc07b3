"""300 random ends of answers against a loop that knows no rounds: stop tokens, stop strings, limits and lengths, with
garbage for a draft, with one that proposes stop tokens everywhere, and with trees; repetition penalties likewise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.decoding.stop_text import StopText
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.table_trees import TreeTableProposer
from deepspec_core.testing.tiny_target import TinyTarget

VOCAB, MOST = 14, 26
PIECES = ["", *"abc", "ab", "bc", "ca", "a b", " ", "cc", "b", "abc", "c", "a"]


def text_of(ids: Sequence[int]) -> str:
    return "".join(PIECES[one] for one in ids)


class Stubborn:
    """Proposes what it is told to, at every place: a stop token, say, or ids at random."""

    def __init__(self, tokens: Sequence[int], max_tokens: int) -> None:
        self.max_tokens, self.taps, self.tokens = max_tokens, (0,), tokens
        self.draw = random.Random(5)

    def open_slots(self, num_slots: int, max_length: int) -> None: ...

    def start(self, *told: Tensor) -> None: ...

    def accept(self, *told: Tensor) -> None: ...

    def free(self, slots: Tensor) -> None: ...

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        chosen = [[self.draw.choice(self.tokens) for _ in range(self.max_tokens)] for _ in slots]
        return Proposal(tokens=torch.tensor(chosen), lengths=limits)


def target() -> TinyTarget:
    return TinyTarget(vocab_size=VOCAB, hidden_size=8, num_layers=1, seed=3)


@cache
def continuation(prompt: tuple[int, ...], penalty: float) -> tuple[int, ...]:
    """The greedy tokens after a prompt, by a pass over all of it for each."""
    model, ids = target(), list(prompt)
    for _ in range(MOST):
        hidden = model.features(torch.tensor([ids]), torch.ones(1, len(ids)), None, None, (0,)).last_hidden[0, -1]
        logits = (hidden @ model.head_weight().T).tolist()
        logits = [(x / penalty if x > 0 else x * penalty) if one in ids else x for one, x in enumerate(logits)]
        ids.append(max(range(VOCAB), key=logits.__getitem__))
    return tuple(ids[len(prompt) :])


def expected(prompt: tuple[int, ...], case: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    output: list[int] = []
    for token in continuation(prompt, case["penalty"]):
        output.append(token)
        if token in case["stop_ids"] or any(one in text_of(output) for one in case["stops"]):
            return tuple(output), "stop"
        if len(output) == case["max_new_tokens"] or len(prompt) + len(output) == case["max_length"]:
            break
    return tuple(output), "length"


def proposers(draw: random.Random, stop_ids: Sequence[int]) -> Callable[[], Proposer | None]:
    width, seed = draw.randint(1, 6), draw.randrange(9)
    return draw.choice(
        [
            lambda: None,
            lambda: TableProposer(vocab_size=VOCAB, max_tokens=width, seed=seed, stop_short=True),
            lambda: TreeTableProposer(vocab_size=VOCAB, max_tokens=width, max_nodes=9, seed=seed, stop_short=True),
            lambda: Stubborn(range(VOCAB), width),
            lambda: Stubborn(stop_ids or (0,), width),
        ]
    )


def test_300_ends_are_those_of_a_loop() -> None:
    draw = random.Random(11)
    pool = [tuple(draw.randrange(VOCAB) for _ in range(draw.randint(1, 4))) for _ in range(30)]
    ends: set[tuple[str, bool]] = set()
    for number in range(300):
        case = {
            "stop_ids": tuple(draw.sample(range(VOCAB), draw.choice([0, 1, 2]))),
            "stops": tuple(draw.sample(["ab", "bca", "c", "a b", "ccab", "abcabc"], draw.choice([0, 0, 1, 2]))),
            "max_new_tokens": draw.choice([1, 2, 3, 9, MOST]),
            "max_length": draw.choice([5, 6, 9, 40]),
            "penalty": draw.choice([1.0, 1.0, 1.3, 4.0]),
        }
        prompts = draw.sample(pool, 3)
        told: dict[str, list[int]] = {}
        found = decode(
            target(),
            proposers(draw, case["stop_ids"])(),
            [Request(id=str(index), prompt_ids=prompt, seed=index) for index, prompt in enumerate(prompts)],
            sampling=Sampling(repetition_penalty=case["penalty"]),
            stop_ids=case["stop_ids"],
            stop_text=StopText(case["stops"], text_of) if case["stops"] else None,
            max_new_tokens=case["max_new_tokens"],
            max_length=case["max_length"],
            batch_size=draw.choice([1, 2, 3]),
            on_round=lambda one, told=told: told.setdefault(one.id, []).extend(one.ids),
        )
        for one in found:
            assert (one.output_ids, one.finish_reason) == expected(one.prompt_ids, case), (number, case)
            assert tuple(told[one.id]) == one.output_ids
            ends.add((one.finish_reason, bool(case["stops"]) and one.output_ids[-1] not in case["stop_ids"]))
    assert len(ends) == 4, "every kind of end"


@pytest.mark.parametrize("kind", ["plain", "chain", "tree"])
def test_sampled_with_a_penalty_and_a_stop_string_alone_as_together(kind: str) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, min_p=0.02, repetition_penalty=1.5)
    made: dict[str, Callable[[], Proposer | None]] = {
        "plain": lambda: None,
        "chain": lambda: TableProposer(vocab_size=VOCAB, max_tokens=3),
        "tree": lambda: TreeTableProposer(vocab_size=VOCAB, max_tokens=3, max_nodes=8),
    }
    requests = [Request(id=str(i), prompt_ids=(2 + i % 5, 3, i % 7), seed=i) for i in range(8)]

    def outputs(some: list[Request], batch_size: int) -> dict[str, tuple[int, ...]]:
        found = decode(
            target(), made[kind](), some, sampling=sampling, stop_ids=(1,), stop_text=StopText(("cc",), text_of),
            max_new_tokens=12, max_length=40, batch_size=batch_size,
        )  # fmt: skip
        return {one.id: one.output_ids for one in found}

    together = outputs(requests, 3)
    assert together == outputs(requests[::-1], 8), "the order of refills changes nothing"
    assert together == {k: v for one in requests for k, v in outputs([one], 1).items()}
