"""Work that several workers share gives what one alone gives: begun, broken off and gone on with in any number.

Workers are threads here, each with a target of its own; tests/test_all_workers.py has processes. Products of other
batches round differently, so answers could part where a random number falls between two sums. None of these few answers
does, and sampling follows a seed of each prompt, so texts are compared exactly.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from thread_workers import COUNTS, Dying, Killed, quick, together  # noqa: F401

from deepspec_core.config.schema import RegenerateOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.crew import Crew
from deepspec_core.data.conversations import from_row
from deepspec_core.data.regenerate import regenerate
from deepspec_core.data.regenerate_report import RegenerateReport
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Request
from deepspec_core.errors import DataError, StageError
from deepspec_core.evaluation.evaluator import evaluate, recorded, summarise
from deepspec_core.evaluation.group_decoding import Decoding, Group
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick")

END = 1


class Talker(Dying):
    """Says capital letters and, sooner or later, its end marker."""

    def __init__(self) -> None:
        super().__init__(vocab_size=340, hidden_size=8, num_layers=2, max_positions=512)

    def decode(self, *arguments: Any, **options: Any) -> Any:
        step = super().decode(*arguments, **options)
        logits = torch.full_like(step.logits, -1e9)
        allowed = [END, *range(35, 61)]
        logits[..., allowed] = step.logits[..., allowed]
        logits[..., END] += 1.5
        return evolve(step, logits=logits)


def answers(
    out: Path, count: int, steps: dict[int, int] | None = None, how: type[BaseException] = Killed, **options: Any
) -> list[Any]:
    """Regenerate by so many workers. The target of worker n ends by an error after steps[n] steps."""

    def work(crew: Crew) -> RegenerateReport:
        target = Talker()
        target.steps, target.how = (steps or {}).get(crew.rank, -1), how
        rows = [{"id": f"c{i}", "turns": [f"Question {i}?", "And then?"][: 1 + i % 2]} for i in range(14)]
        rows[5] = {"id": "c5", "turns": ["a", "\ud800"]}  # not Unicode
        rows[8] = {"id": "c8", "turns": ["\ud800"]}
        rows.append({"id": "c14", "turns": ["a" * 300]})  # too long
        return regenerate(
            (from_row(row, "test") for row in rows),
            target=target,
            tokenizer=ChatTokenizer(tiny_tokenizer()),
            fmt=tiny_format(),
            options=RegenerateOptions(max_tokens=24, batch_size=2, **{"max_failures": 0.5, **options}),
            sampling=Sampling(temperature=1.0),
            stop_ids=(END,),
            out=out,
            seed=5,
            max_length=256,
            crew=crew,
        )

    return together(count, work)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, RegenerateReport]:
    out = tmp_path_factory.mktemp("alone") / "out.jsonl"
    (report,) = answers(out, 1)
    return out.read_bytes(), report


def _same(report: RegenerateReport, expected: RegenerateReport) -> bool:
    """But for the place, and for what earlier runs did."""
    own = {"path": expected.path, "failures_path": expected.failures_path, "written": 0, "skipped": 0}
    return evolve(report, **own) == evolve(expected, **own)


def test_two_workers_regenerate_what_one_does(tmp_path: Path, alone: tuple[bytes, RegenerateReport]) -> None:
    out = tmp_path / "out.jsonl"
    first, second = answers(out, 2)
    assert out.read_bytes() == alone[0]
    assert _same(first, alone[1])
    assert first.written == 12
    assert 0 < second.written < 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.failures.jsonl"]
    failures = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl.failures.jsonl").read_text().splitlines()]
    assert sorted(failures) == ["c14", "c5", "c8"]
    assert (first.failures, first.too_long) == (2, 1)
    assert _same(answers(out, 3)[0], alone[1]), "done, and looked at once more"


@COUNTS
def test_a_regeneration_goes_on_with_another_number(
    tmp_path: Path, alone: tuple[bytes, RegenerateReport], counts: tuple[int, int]
) -> None:
    out = tmp_path / "out.jsonl"
    before, after = counts
    ends = answers(out, before, dict.fromkeys(range(before), 60 // before))
    assert any(isinstance(end, Killed) for end in ends)
    done = sum(len(path.read_bytes().splitlines()) for path in tmp_path.glob("out.jsonl.partial*"))
    assert 0 < done < 12
    # A kill in the middle of a line.
    with next(iter(sorted(tmp_path.glob("out.jsonl.partial*"), reverse=True))).open("ab") as file:
        file.write(b'{"id": "c1')
    first, *_ = answers(out, after)
    assert out.read_bytes() == alone[0]
    assert _same(first, alone[1])
    assert first.written == 12 - done, "nothing twice"


@pytest.mark.parametrize("how", [Killed, RuntimeError])
def test_a_worker_that_ends_ends_the_others_with_its_reason(tmp_path: Path, how: type[BaseException]) -> None:
    first, second = answers(tmp_path / "out.jsonl", 2, {1: 5}, how)
    assert isinstance(second, how)
    assert isinstance(first, StageError)
    assert "Worker 1 of 2 ended" in str(first)
    assert ("no sign of life" if how is Killed else "RuntimeError: out of memory") in str(first)


def test_failures_are_counted_over_all_workers(tmp_path: Path) -> None:
    """Each has one, which its own share would forgive."""
    ends = answers(tmp_path / "out.jsonl", 2, max_failures=0.05)
    assert isinstance(ends[0], DataError)
    assert "2 of 14" in str(ends[0])
    assert len((tmp_path / "out.jsonl.partial").read_bytes().splitlines()) == 12, "nothing is lost"


def test_workers_that_read_other_conversations_are_refused(tmp_path: Path) -> None:
    def work(crew: Crew) -> Any:
        target = Talker()
        rows = [{"id": f"c{i + crew.rank}", "turns": ["Question?"]} for i in range(4)]
        return regenerate(
            (from_row(row, "test") for row in rows),
            target=target,
            tokenizer=ChatTokenizer(tiny_tokenizer()),
            fmt=tiny_format(),
            options=RegenerateOptions(max_tokens=4),
            sampling=Sampling(temperature=1.0),
            stop_ids=(END,),
            out=tmp_path / "out.jsonl",
            seed=5,
            max_length=256,
            crew=crew,
        )

    first, _ = together(2, work)
    assert "Worker 1 read other conversations" in str(first)


def figures(
    folder: Path, count: int, steps: dict[int, int] | None = None, machines: tuple[str, ...] = ("m", "m", "m")
) -> list[Any]:
    """Evaluate by so many workers; each has one thread, or two where it is alone."""
    folder.mkdir(exist_ok=True)

    def work(crew: Crew) -> list[Group]:
        target = Dying(vocab_size=12, hidden_size=8, num_layers=2, seed=3)
        target.steps = (steps or {}).get(crew.rank, -1)
        return evaluate(
            [Request(id=str(n), prompt_ids=(4, 7, 3, 2 + n % 8), seed=n) for n in range(11)],
            Decoding(
                target=target,
                proposer=TableProposer(vocab_size=12, max_tokens=3),
                sampling=Sampling(temperature=1.0),
                stop_ids=(),
                max_new_tokens=12,
                max_length=32,
                batch_size=2,
            ),
            journal=folder / "j.jsonl",
            prompts_digest="d",
            what="test",
            machine={"device": machines[crew.rank], "threads": 2 if crew.count == 1 else 1},
            crew=crew,
        )

    return together(count, work)


def _without_clocks(groups: list[Group]) -> dict[str, Any]:
    found = summarise(groups, seed=0)
    for clock in ("speculative", "plain", "speedup", "speedup_median_of_groups", "workers"):
        found.pop(clock)
    return found


def test_two_workers_evaluate_what_one_does(tmp_path: Path) -> None:
    (alone,) = figures(tmp_path / "one", 1)
    first, second = figures(tmp_path / "two", 2)
    assert [group.completions for group in first] == [group.completions for group in alone]
    assert _without_clocks(first) == _without_clocks(alone)
    assert (summarise(first, seed=0)["workers"], summarise(alone, seed=0)["workers"]) == (2, 1)
    assert 0 < len(second) < len(alone)
    assert recorded(tmp_path / "two" / "j.jsonl")[1] == first
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["j.jsonl"]


@COUNTS
def test_an_evaluation_goes_on_with_another_number(tmp_path: Path, counts: tuple[int, int]) -> None:
    (alone,) = figures(tmp_path / "one", 1)
    before, after = counts
    ends = figures(tmp_path / "again", before, dict(enumerate((90, 70, 50)[:before])))
    assert any(isinstance(end, Killed) for end in ends)
    done = sum(len(path.read_text().splitlines()) - 1 for path in (tmp_path / "again").iterdir())
    assert 0 < done < 6
    first, *_ = figures(tmp_path / "again", after)
    assert _without_clocks(first) == _without_clocks(alone)
    assert summarise(first, seed=0)["workers"] == max(counts)
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["j.jsonl"]


def test_workers_of_another_speed_are_refused(tmp_path: Path) -> None:
    """Their timings would stand in one table. Sharing the cores of one machine is no other speed."""
    first, second = figures(tmp_path / "two", 2, machines=("m", "slow"))
    assert "another speed" in str(second)
    assert isinstance(first, StageError)
