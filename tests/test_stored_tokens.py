"""A run's tokens are stored once, are those of its conversations, and follow every change of what they come from."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from deepspec_core.config.load import load_run_file
from deepspec_core.contracts.draft import Sample
from deepspec_core.data.encoding import Row
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.errors import DataError
from deepspec_core.pipeline import run_tokens, workers
from deepspec_core.pipeline.reads import Trace
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import load_plugins


def _row(number: int, answer: str = "Well, a few words on that. ") -> dict[str, object]:
    said = [{"role": "user", "content": f"Ask {number}"}, {"role": "assistant", "content": answer * (1 + number % 5)}]
    return {"id": f"row {number}", "messages": said}


def _write(path: Path, rows: list[dict[str, object]], bad: int = 1) -> None:
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n" * bad)


def _run(path: Path, *changes: str) -> Run:
    plugins = load_plugins()
    given = [
        'data.sources=[{path = "rows.jsonl"}]',
        "data.held_out=0.0",
        'run.stages=["train"]',
        'features.mode="online"',
        "data.min_supervised_tokens=1",
        *changes,
    ]
    return Run(file=load_run_file(path, overrides=given, plugins=plugins), path=path, plugins=plugins)


def _content(samples: list[Sample]) -> list[tuple[str, list[int], list[bool], int]]:
    return [(one.id, one.input_ids.tolist(), one.loss_mask.tolist(), one.original_length) for one in samples]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each conversation was tokenised."""
    counts: Counter[str] = Counter()
    rows = ChatTokenizer.sample_rows

    def counted(self: ChatTokenizer, conversation: object, *rest: object) -> list[Row]:
        counts[conversation.id] += 1  # type: ignore[attr-defined]
        return rows(self, conversation, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatTokenizer, "sample_rows", counted)
    return counts


def test_stored_tokens_are_those_of_the_conversations(run_file: Path, made: Counter[str]) -> None:
    spoilt = _row(30, "An end <|im_end|> in it. ")
    _write(run_file, [*[_row(number) for number in range(30)], spoilt, _row(7), {**_row(8), "id": "row 7"}])
    run, counts = _run(run_file), Counter[str]()
    plain = list(run.data.tokenized(run.data.training_conversations(counts), counts))
    made.clear()
    assert _content(run.data.training_samples()) == _content(plain)
    assert +run.data.counts == +counts
    assert {"malformed": 1, "control_tokens": 1, "duplicates": 1, "renamed": 1}.items() <= counts.items()
    assert made.total() == 32
    again = _run(run_file)
    assert _content(again.data.training_samples()) == _content(plain)
    assert +again.data.counts == +counts
    assert made.total() == 32


def test_what_was_read_is_noted_where_it_was_stored_before(run_file: Path) -> None:
    """A stage that finds its tokens stored depends on what they were made from, all the same."""

    def noted() -> Trace:
        run = _run(run_file)
        with run.reads.traced() as trace:
            run.data.training_samples()
        return trace

    _write(run_file, [_row(number) for number in range(4)])
    first, second = noted(), noted()
    assert second.keys == first.keys
    assert second.content == first.content


def test_the_bound_that_people_are_shown_is_no_reading(run_file: Path) -> None:
    """A worker that shows progress, and one that finds the tokens stored, note the same."""
    run = _run(
        run_file, 'run.stages=["regenerate", "train"]', "regenerate.answers=2", 'data.sources=[{path = "a", limit = 7}]'
    )
    with run.reads.traced() as trace:
        bound = run.data.expected_conversations()
    assert bound == 14
    assert not trace.keys & {"regenerate.answers", "data.sources"}


CHANGES = {
    "data.max_length": "data.max_length=30",
    "data.system_prompt": 'data.system_prompt="Be brief."',
    "data.min_supervised_tokens": "data.min_supervised_tokens=12",
    "data.held_out": "data.held_out=0.4",
    "run.seed": "run.seed=5",
    "data.supervise_newline": "data.supervise_newline=true",
    "data.duplicates": 'data.duplicates="drop"',
    "limit": 'data.sources=[{path = "rows.jsonl", limit = 3}]',
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES.items()])
def test_a_changed_key_makes_them_anew(
    run_file: Path, change: str, made: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    _write(run_file, [_row(number % 20) | {"id": str(number)} for number in range(24)])
    _run(run_file).data.training_samples()
    made.clear()
    run = _run(run_file, change)
    stored = _content(run.data.training_samples())
    assert made.total()
    assert "made again: changed since" in caplog.text
    assert stored == _content(list(run.data.tokenized(run.data.training_conversations(), Counter())))


def test_an_edited_source_makes_them_anew(run_file: Path, made: Counter[str]) -> None:
    _write(run_file, [_row(number) for number in range(6)])
    before = _content(_run(run_file).data.training_samples())
    _write(run_file, [_row(number) for number in range(5)] + [_row(5, "Other words than those before, and more. ")])
    after = _content(_run(run_file).data.training_samples())
    assert after[:5] == before[:5]
    assert after[5] != before[5]
    assert made.total() == 12


def test_a_source_that_changes_while_it_is_tokenised_is_refused(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [_row(number) for number in range(6)]
    _write(run_file, rows, bad=0)
    run = _run(run_file)
    read = ChatTokenizer.sample_rows

    def edited(self: ChatTokenizer, conversation: object, *rest: object) -> list[Row]:
        _write(run_file, [*rows, _row(6)], bad=0)
        return read(self, conversation, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatTokenizer, "sample_rows", edited)
    with pytest.raises(DataError, match="changed while it was read"):
        run.data.training_samples()


def test_another_mask_token_is_counted_without_tokenising_again(run_file: Path, made: Counter[str]) -> None:
    _write(run_file, [_row(number) for number in range(6)])
    samples = _run(run_file).data.training_samples()
    made.clear()
    run = _run(run_file)
    run.data.mask_token = int(samples[2].input_ids[-3])
    again = run.data.training_samples()
    assert run.data.counts["mask_token"] == sum(run.data.mask_token in one.input_ids.tolist() for one in again) > 0
    assert not made


def test_other_workers_wait_for_what_the_first_one_stores(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, made: Counter[str]
) -> None:
    _write(run_file, [_row(number) for number in range(6)])
    stored: list[list[tuple[str, list[int], list[bool], int]]] = []

    def first_worker(_seconds: float) -> None:
        monkeypatch.setattr(workers, "rank", lambda: 0)
        stored.append(_content(_run(run_file).data.training_samples()))
        monkeypatch.setattr(workers, "rank", lambda: 1)

    monkeypatch.setattr(run_tokens.time, "sleep", first_worker)
    monkeypatch.setattr(workers, "rank", lambda: 1)
    run = _run(run_file)
    assert [_content(run.data.training_samples())] == stored
    assert run.data.counts["malformed"] == 1
    assert made.total() == 6


@pytest.mark.slow
def test_two_processes_make_what_one_makes(run_file: Path) -> None:
    rows = [_row(number) for number in range(150)]
    _write(run_file, [*rows, _row(151, "An end <|im_end|> in it. ")])
    one = _run(run_file)
    alone = _content(one.data.training_samples())
    shutil.rmtree(one.data.tokens_folder)
    two = _run(run_file, "data.workers=2")
    assert _content(two.data.training_samples()) == alone
    assert two.data.counts == one.data.counts
    # The number of processes is none of the facts.
    assert torch.equal(_run(run_file).data.training_samples()[0].input_ids, two.data.training_samples()[0].input_ids)
