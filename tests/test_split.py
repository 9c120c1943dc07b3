"""No question stands in training and among held-out prompts, whatever its id, case, spacing or source."""

import json
import random
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deepspec_core.config.load import load_run_file
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.split import is_held_out, prompt_digest, whole_prompt_digest
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import load_plugins


def _write(path: Path, questions: list[str], **more: Any) -> None:
    rows = []
    for number, question in enumerate(questions):
        asked = [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
        identity = {"id": f"{path.stem}-{number}"} if more.get("ids", True) else {}
        rows.append({"messages": [*more.get("before", []), *asked], **identity})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run(run_file: Path, *sources: str, more: list[str] | None = None) -> Run:
    listed = ",".join(f'{{path="{name}"}}' for name in sources)
    plugins = load_plugins()
    overrides = [f"data.sources=[{listed}]", "data.held_out=0.2", *(more or [])]
    return Run(file=load_run_file(run_file, overrides=overrides, plugins=plugins), path=run_file, plugins=plugins)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def test_two_sources_with_the_same_prompts_share_no_question(run_file: Path) -> None:
    draw = random.Random(0)
    questions = [f"What is {draw.randrange(10**6)} plus {draw.randrange(10**6)}?" for _ in range(900)]
    _write(run_file.parent / "one.jsonl", questions)
    changed = [f"  {text.upper()}\n".replace(" ", "\u00a0", 2) for text in questions]
    _write(run_file.parent / "two.jsonl", changed, before=[{"role": "system", "content": "Be brief."}])
    _write(run_file.parent / "three.jsonl", questions[::-1], ids=False)
    data = _run(run_file, "one.jsonl", "two.jsonl", "three.jsonl").data
    counts: Counter[str] = Counter()
    train = {_question(one) for one in data.conversations("train", counts)}
    held_out = {_question(one) for one in data.conversations("held_out")}
    assert not train & held_out
    assert train | held_out == {_normal(text) for text in questions}
    assert 0.14 < len(held_out) / 900 < 0.26
    assert counts["same_question"] == 2 * len(train)
    assert counts["conversations"] == 3 * len(train)


def test_repeated_prompts_are_dropped_across_sources_where_the_run_asks_for_it(run_file: Path) -> None:
    folder = run_file.parent
    _write(folder / "one.jsonl", ["What is 1?", "What is 2?"])
    _write(folder / "two.jsonl", ["  WHAT is\n1?", "What is 3?"])
    french = [{"role": "system", "content": "Answer in French."}]
    _write(folder / "three.jsonl", ["What is 1?", "what is 1?"], before=french)
    more = [*({"role": role, "content": text} for role, text in (("user", "What is 2?"), ("assistant", "2.")))]
    row = {"id": "longer", "messages": [*more, {"role": "user", "content": "And 4?"}]}
    (folder / "four.jsonl").write_text(json.dumps(row) + "\n")
    names = ["one.jsonl", "two.jsonl", "three.jsonl", "four.jsonl"]
    kept, dropped = Counter[str](), Counter[str]()
    run = _run(run_file, *names)
    assert len([*run.data.conversations("train", kept), *run.data.conversations("held_out", kept)]) == 7
    assert kept["same_prompt"] == 0
    run = _run(run_file, *names, more=['data.duplicates="drop"'])
    found = [*run.data.conversations("train", dropped), *run.data.conversations("held_out", dropped)]
    assert sorted(one.id for one in found) == ["longer", "one-0", "one-1", "three-0", "two-1"]
    assert dropped["same_prompt"] == 2


def test_data_duplicates_is_part_of_what_a_cache_is_made_from(run_file: Path) -> None:
    _write(run_file.parent / "one.jsonl", ["What is 1?"])
    headers = [
        _run(
            run_file, "one.jsonl", more=['run.stages=["cache", "train"]', f'data.duplicates="{choice}"']
        ).cache.header()
        for choice in ("keep", "drop")
    ]
    assert headers[0].source != headers[1].source


@given(text=st.text(min_size=1), answers=st.tuples(st.text(), st.text()))
def test_a_prompt_is_what_systems_and_users_say(text: str, answers: tuple[str, str]) -> None:
    system = {"role": "system", "content": "Be brief."}
    one, two = (
        Conversation(id=answer, messages=(*_asking(text, "").messages, {"role": "assistant", "content": answer}))
        for answer in answers
    )
    assert whole_prompt_digest(one) == whole_prompt_digest(two)
    assert whole_prompt_digest(one) != whole_prompt_digest(_asking(text, "", system))
    # Where one message ends matters.
    assert whole_prompt_digest(_asking("b", "", {"role": "user", "content": "a"})) != whole_prompt_digest(
        _asking("a b", "")
    )


def _question(conversation: Conversation) -> str:
    return _normal(next(one["content"] for one in conversation.messages if one["role"] == "user"))


def _asking(text: str, identity: str, *before: dict[str, str]) -> Conversation:
    return Conversation(id=identity, messages=(*before, {"role": "user", "content": text}))


@given(
    text=st.text(), seed=st.integers(0, 2**63 - 1), share=st.floats(0, 0.5), spaces=st.sampled_from([" ", "\n", "\t "])
)
def test_the_split_is_a_property_of_the_question_and_the_seed(text: str, seed: int, share: float, spaces: str) -> None:
    one = _asking(text, "1")
    other = _asking(spaces + spaces.join(text.split()) + spaces, "2", {"role": "system", "content": "x"})
    found = [is_held_out(prompt_digest(each), held_out=share, seed=seed) for each in (one, other)]
    assert found[0] == found[1]
    assert not is_held_out(prompt_digest(one), held_out=0.0, seed=seed)


def test_conversations_without_a_question_are_told_by_their_content() -> None:
    given = [Conversation(id="x", messages=(), input_ids=(1, number), loss_mask=(0, 1)) for number in range(3)]
    assert len({prompt_digest(one) for one in given}) == 3
    assert prompt_digest(given[0]) == prompt_digest(
        Conversation(id="y", messages=(), input_ids=(1, 0), loss_mask=(0, 1))
    )
