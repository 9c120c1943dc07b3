"""The dialogue streams: splits that share nothing, stable identifiers, right answers, no heavy imports."""

import itertools
import subprocess
import sys

import pytest

from deepspec_targets.dialogues import KINDS, answer_of, check, dialogues, prompts, split_of

MANY = 20_000
FIRST_HELD_OUT = ["arithmetic-8087932b7b140cfa", "arithmetic-988938cd853c87b1", "conversion-50f62d7e9424fe29"]


def texts(split: str, count: int, seed: int = 0) -> list[str]:
    return [item["messages"][0]["content"] for item in itertools.islice(prompts(split, seed=seed), count)]


def test_splits_share_no_prompt() -> None:
    train = set(texts("train", MANY))
    held_out = set(texts("held_out", MANY // 4, seed=1))
    assert not train & held_out
    assert {split_of(text) for text in train} == {"train"}
    assert {split_of(text) for text in held_out} == {"held_out"}


@pytest.mark.parametrize(("split", "count"), [("train", MANY), ("held_out", MANY // 4)])
def test_no_prompt_and_no_identifier_comes_twice(split: str, count: int) -> None:
    items = list(itertools.islice(prompts(split), count))
    assert len(items) == count
    assert len({item["id"] for item in items}) == count
    assert len({item["messages"][0]["content"] for item in items}) == count


def test_identifiers_depend_on_the_text_alone() -> None:
    first = {item["messages"][0]["content"]: item["id"] for item in itertools.islice(prompts("held_out"), 3_000)}
    second = {
        item["messages"][0]["content"]: item["id"] for item in itertools.islice(prompts("held_out", seed=7), 3_000)
    }
    shared = first.keys() & second.keys()
    assert shared
    assert all(first[text] == second[text] for text in shared)


def test_same_seed_same_stream_other_seed_another() -> None:
    assert list(itertools.islice(dialogues("train", seed=3), 300)) == list(
        itertools.islice(dialogues("train", seed=3), 300)
    )
    assert texts("train", 300, seed=3) != texts("train", 300, seed=4)


def test_the_stream_is_stable_across_versions() -> None:
    # Runs are compared across machines and releases; whoever changes the generator should do so knowingly.
    assert [item["id"] for item in itertools.islice(prompts("held_out"), 3)] == FIRST_HELD_OUT


def test_dialogues_are_the_prompts_answered() -> None:
    asked = list(itertools.islice(prompts("held_out", seed=2), 500))
    answered = list(itertools.islice(dialogues("held_out", seed=2), 500))
    for prompt, dialogue in zip(asked, answered, strict=True):
        assert prompt["id"] == dialogue["id"]
        assert prompt["messages"] == dialogue["messages"][:1]
        assert [message["role"] for message in dialogue["messages"]] in (
            ["user", "assistant"],
            ["user", "assistant", "user", "assistant"],
        )
    assert any(len(dialogue["messages"]) == 4 for dialogue in answered)


def test_every_kind_occurs_and_own_answers_are_right() -> None:
    checked_kinds = {kind.name for kind in KINDS if kind.result is not None}
    seen: set[str] = set()
    for dialogue in itertools.islice(dialogues("train", seed=5), 5_000):
        question, answer = (message["content"] for message in dialogue["messages"][:2])
        seen.add(dialogue["kind"])
        assert check(question, answer) is (True if dialogue["kind"] in checked_kinds else None), question
    assert seen == {kind.name for kind in KINDS}


@pytest.mark.parametrize(
    ("question", "result"),
    [
        ("What is 347 + 586?", 933),
        ("Subtract 286 from 347.", 61),
        ("Multiply 47 by 6.", 282),
        ("How much is 92 - 7 + 4?", 89),
        ("Convert 3 hours and 25 minutes to minutes.", 205),
        ("How many hours are 480 minutes?", 8),
        ("Mia has 23 apples and Tom has 15 apples. How many apples do they have together?", 38),
        ("Tom packs 3 boxes with 5 cookies in each box. 19 cookies do not fit. How many cookies are there in all?", 34),
        ("Describe a small red bicycle.", None),
    ],
)
def test_results_are_read_from_the_prompt(question: str, result: int | None) -> None:
    assert answer_of(question) == result
    if result is not None:
        assert check(question, f"Some steps: 1 + 1 = 2.\nSo the answer is {result}.") is True
        assert check(question, f"So the answer is {result + 1}.") is False
        assert check(question, "I do not know.") is False


@pytest.mark.parametrize("stream", [prompts, dialogues])
def test_an_unknown_split_is_refused_at_once(stream: object) -> None:
    with pytest.raises(ValueError, match=r"unknown split 'test'.*train.*held_out"):
        stream("test")  # type: ignore[operator]


def test_importing_the_dialogues_imports_nothing_heavy() -> None:
    code = (
        "import sys, deepspec_targets.dialogues;"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
