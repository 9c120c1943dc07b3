"""Which rows become conversations, and what malformed ones say."""

import pytest

from deepspec_core.data.conversations import from_row
from deepspec_core.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def test_the_shapes_of_the_hub_are_one() -> None:
    plain = from_row({"messages": [USER, ANSWER]}, "f:1")
    shared = from_row({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "f:1")
    assert plain == shared
    assert plain.messages == (USER, ANSWER)
    assert from_row({"turns": ["Hi", "More"]}, "f:1").messages == (USER, {"role": "user", "content": "More"})


def test_ids_are_given_or_depend_on_the_content_alone() -> None:
    assert from_row({"id": 7, "messages": [USER]}, "f:1").id == "7"
    unnamed = from_row({"messages": [USER]}, "f:1")
    assert unnamed.id == from_row({"messages": [{**USER, "extra": 1}], "other": 2}, "g:9").id
    assert unnamed.id != from_row({"messages": [ANSWER]}, "f:1").id


def test_regenerated_rows_carry_their_tokens() -> None:
    row = {"messages": [USER], "prompt_ids": [5, 6, 7, 8], "prompt_answers": [[1, 3]], "output_ids": [9, 1]}
    conversation = from_row(row, "f:1")
    assert conversation.input_ids == (5, 6, 7, 8, 9, 1)
    assert conversation.loss_mask == (0, 1, 1, 0, 1, 1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], "not an object"),
        ({"mesages": [USER]}, "'messages' meant"),
        ({"messages": []}, "no conversation"),
        ({"messages": "Hi"}, "not a list"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "'assistant' meant"),
        ({"messages": [{"role": "user", "content": None}]}, "not text"),
        ({"turns": ["a", 3]}, "turns[1]"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "differ in length"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "0 and 1"),
        ({"input_ids": [1, -2], "loss_mask": [1, 1]}, "token ids"),
        ({"prompt_ids": [1], "output_ids": [2], "prompt_answers": [[0, 2]]}, "leaves the prompt"),
    ],
)
def test_malformed_rows_say_where(row: object, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        from_row(row, "data.jsonl:12")
    assert expected in str(caught.value)
    assert "data.jsonl:12" in str(caught.value)
