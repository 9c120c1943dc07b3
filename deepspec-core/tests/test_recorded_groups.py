"""A line of a round journal: what a decoded group cannot have is refused, and so is whatever else was edited."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.errors import DataError
from deepspec_core.evaluation.group_decoding import Group, Timing
from deepspec_core.evaluation.recorded_groups import Bounds, entry_of, group_of

BOUNDS = Bounds(max_tokens=5, vocab_size=50)
# In the first answer a stop token was accepted last; the second hit its limit of four tokens; the third began with a
# stop token; the fourth has a tree of nine tokens.
ROUNDS = [
    ((Round(5, 0, 1, (0.5, 0.0, -1.0, 0.25, 2.0)), Round(3, 3, 3, (1.0, 1.0, 1.0))), 5, "stop"),
    ((Round(5, 1, 2), Round(5, 4, 5)), 4, "length"),
    ((), 1, "stop"),
    ((Round(4, 2, 3, None, 9),), 4, "length"),
]
GROUP = Group(
    completions=tuple(
        Completion(id=f"p{n}", prompt_ids=(7, 49), output_ids=(3,) * tokens, finish_reason=reason, rounds=rounds)
        for n, (rounds, tokens, reason) in enumerate(ROUNDS)
    ),
    speculative=Timing(tokens=14, wall=0.5, prefill=0.1, draft=0.1, verify=0.2, host=0.1),
    plain=None,
)


def line() -> dict[str, Any]:
    """The line as it is read."""
    read: dict[str, Any] = json.loads(json.dumps(entry_of(GROUP)))
    return read


def test_a_line_is_read_as_it_was_written_and_one_of_before_without_a_digest() -> None:
    assert group_of(line(), "j:2", bounds=BOUNDS) == GROUP
    before = line()
    del before["digest"]
    assert group_of(before, "j:2", bounds=BOUNDS) == GROUP


def test_an_edit_that_could_be_of_rounds_is_told_by_the_digest() -> None:
    edited = line()
    edited["completions"][0]["output_ids"][2] += 1
    with pytest.raises(DataError, match=r"(?s)A line of a journal is damaged.*j:2.*digest"):
        group_of(edited, "j:2", bounds=BOUNDS)


def change(answer: int, number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry["completions"][answer]["rounds"][number].update(values)


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry["completions"][0].update({name: value})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (change(1, 0, accepted_draft_length=50, acceptance_length=51), "50 of 5 proposed tokens accepted"),
        (change(1, 0, accepted_draft_length=-1, acceptance_length=0), "-1 of 5"),
        (change(1, 0, proposal_length=6), "6 proposed tokens of a draft that proposes 5"),
        (change(1, 0, acceptance_length=4), "4 tokens committed where 1 were accepted"),
        (change(1, 0, accepted_draft_length=2), "2 tokens committed where 2 were accepted"),
        (change(0, 0, confidence=[0.5]), "confidences that are not one of each of 5"),
        (change(0, 0, confidence=[float("nan")] * 5), "confidences"),
        (change(0, 0, accepted_draft_length="0"), "numbers that are none"),
        (change(3, 0, nodes=3), "2 of 4"),
        (put("output_ids", [3] * 6), "6 tokens of output from rounds that committed 4"),
        (put("output_ids", [3]), "1 tokens of output"),
        (put("output_ids", [3, 3, 50, 3, 3]), "outside the vocabulary, in p0"),
        (put("prompt_ids", [-1, 49]), "outside the vocabulary"),
        (put("finish_reason", "done"), "'done'"),
        (lambda entry: entry["speculative"].update(wall="x"), "times that are none"),
        (lambda entry: entry["speculative"].update(wall=0.0), "times that are none"),
        (lambda entry: entry["speculative"].update(tokens=9), "9 tokens in its time, and 14"),
    ],
)
def test_what_no_decoding_records_is_refused(edit: Callable[[dict[str, Any]], None], says: str) -> None:
    entry = line()
    del entry["digest"]
    edit(entry)
    with pytest.raises(DataError, match="A line of a journal is damaged") as caught:
        group_of(entry, "j:2", bounds=BOUNDS)
    assert says in str(caught.value)
    assert "j:2" in str(caught.value)
