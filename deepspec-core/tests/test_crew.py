"""Work that several workers share gives what one alone gives: begun, broken off and gone on with in any number.

Workers are threads here, each with a target of its own; tests/test_all_workers.py has processes. Products of other
batches round differently, so answers could part where two tokens are nearly equal. Greedy decoding of these targets has
no such tie, and sampling follows a seed of each prompt, so texts are compared exactly. Features are computed in the
same batches whoever computes them, so they are equal bit for bit.
"""

import json
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from torch.distributed import HashStore

from deepspec_core import crew as crews
from deepspec_core.cache.binary_v2 import BinaryV2Format
from deepspec_core.cache.filling import Filling, fill
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.config.schema import RegenerateOptions
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.crew import Crew
from deepspec_core.data.conversations import from_row
from deepspec_core.data.regenerate import RegenerateReport, regenerate
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Request
from deepspec_core.errors import CacheError, DataError, StageError
from deepspec_core.evaluation.evaluator import Decoding, Group, evaluate, recorded, summarise
from deepspec_core.features.capture import capture
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.tiny_target import TinyTarget
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

END = 1
# Workers of the run that is broken off, and of the one that goes on.
COUNTS = pytest.mark.parametrize(
    "counts", [(3, 2), pytest.param((2, 1), marks=pytest.mark.slow), pytest.param((1, 3), marks=pytest.mark.slow)]
)


class Killed(Exception):
    """Stands for a kill: nobody is told."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"_BEAT_SECONDS": 0.02, "_POLL_SECONDS": 0.01, "SILENCE_SECONDS": 0.5}.items():
        monkeypatch.setattr(crews, name, seconds)


def together(count: int, work: Callable[[Crew], Any]) -> list[Any]:
    """What the work returns, or the error that ends it, of each of so many workers."""
    store = HashStore()
    ends: list[Any] = [None] * count

    def worker(rank: int) -> None:
        crew = Crew(rank=rank, count=count, store=store if count > 1 else None)
        watch = crew.watch(store) if count > 1 else None
        try:
            ends[rank] = work(crew)
        except Exception as error:
            ends[rank] = error
            if not isinstance(error, Killed):
                crew.fail(error)
        if watch is not None:
            watch.end()

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a worker hangs"
    return ends


class Dying(TinyTarget):
    """A target whose process ends after some steps."""

    steps = -1
    how: type[Exception] = Killed

    def decode(self, *arguments: Any, **options: Any) -> Any:
        self.steps -= 1
        if self.steps == 0:
            raise self.how("out of memory")
        return super().decode(*arguments, **options)


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
    out: Path, count: int, steps: dict[int, int] | None = None, how: type[Exception] = Killed, **options: Any
) -> list[Any]:
    """Regenerate by so many workers. The target of worker n ends by an error after steps[n] steps."""

    def work(crew: Crew) -> RegenerateReport:
        target = Talker()
        target.steps, target.how = (steps or {}).get(crew.rank, -1), how
        rows = [{"id": f"c{i}", "turns": [f"Question {i}?", "And then?"][: 1 + i % 2]} for i in range(14)]
        rows[5] = {"id": "c5", "turns": ["a" * 300]}  # too long
        rows[8] = {"id": "c8", "turns": ["b" * 300]}
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
    assert sorted(failures) == ["c5", "c8"]
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
def test_a_worker_that_ends_ends_the_others_with_its_reason(tmp_path: Path, how: type[Exception]) -> None:
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


HEADER = CacheHeader(
    target="builtin:tiny", revision="abc", adapter="tiny", taps=(0, 2), hidden_size=16, vocab_size=64,
    dtype="bfloat16", tokenizer="tok", template="tem", max_length=32, source="src", plugins={},
)  # fmt: skip
FORMATS = pytest.mark.parametrize(
    "cache_format",
    [
        pytest.param(HDF5Format(), id="hdf5"),
        pytest.param(BinaryV2Format(), id="deepspec-v2", marks=pytest.mark.slow),
    ],
)


def filled(
    folder: Path, count: int, cache_format: Any, dies: dict[int, int] | None = None, shard: int = 3
) -> list[Any]:
    """Fill a cache by so many workers; worker n ends after dies[n] samples."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            id=f"sample-{i}",
            input_ids=torch.randint(64, (length := 3 + i % 7,), generator=generator),
            loss_mask=torch.rand(length, generator=generator) > 0.5,
            original_length=length,
        )
        for i in range(20)
    ]
    order = sorted(samples, key=lambda sample: (-len(sample.input_ids), sample.id))

    def work(crew: Crew) -> None:
        target = TinyTarget(hidden_size=16)

        def captured(done: Collection[str]) -> Iterator[Sample]:
            made = capture(samples, target, HEADER.taps, batch_size=4, dtype=torch.bfloat16, done=done)
            for number, sample in enumerate(made):
                if number == (dies or {}).get(crew.rank):
                    raise Killed
                yield sample

        fill(
            Filling(
                cache_format=cache_format,
                folder=folder,
                header=HEADER,
                ids=[sample.id for sample in order],
                lengths=[len(sample.input_ids) for sample in order],
                captured=captured,
                require_space=lambda tokens, shards: None,
                shard_samples=shard,
            ),
            crew,
        )

    return together(count, work)


def _files(folder: Path) -> dict[str, bytes]:
    names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if name != "writer.lock"}


def _require_same_cache(found: Path, expected: Path, cache_format: Any) -> None:
    assert cache_format.verify(found) == []
    one, other = cache_format.open(found, HEADER), cache_format.open(expected, HEADER)
    assert one.ids() == other.ids()
    for index in range(len(other)):
        mine, theirs = one[index], other[index]
        assert mine.input_ids.equal(theirs.input_ids)
        assert mine.loss_mask.equal(theirs.loss_mask)
        assert mine.features.hidden.equal(theirs.features.hidden)
        assert mine.features.last_hidden.equal(theirs.features.last_hidden)
    assert not list(found.glob("part-*"))


@FORMATS
def test_three_workers_write_the_cache_of_one(tmp_path: Path, cache_format: Any) -> None:
    assert filled(tmp_path / "one", 1, cache_format) == [None]
    assert filled(tmp_path / "three", 3, cache_format) == [None] * 3
    _require_same_cache(tmp_path / "three", tmp_path / "one", cache_format)
    assert _files(tmp_path / "three").keys() == _files(tmp_path / "one").keys()


@FORMATS
@COUNTS
def test_a_cache_goes_on_with_another_number(tmp_path: Path, cache_format: Any, counts: tuple[int, int]) -> None:
    """Another size of shards, too: the samples stay in their order."""
    filled(tmp_path / "one", 1, cache_format)
    before, after = counts
    ends = filled(tmp_path / "again", before, cache_format, dict(enumerate((5, 8, 2)[:before])))
    assert any(isinstance(end, Killed) for end in ends)
    assert filled(tmp_path / "again", after, cache_format, shard=4) == [None] * after
    _require_same_cache(tmp_path / "again", tmp_path / "one", cache_format)


def test_a_damaged_part_is_written_again(tmp_path: Path) -> None:
    filled(tmp_path / "one", 1, HDF5Format())
    filled(tmp_path / "again", 2, HDF5Format(), {0: 8, 1: 8})
    parts = sorted((tmp_path / "again").glob("part-*/shard-*.h5"))
    assert len(parts) > 2
    parts[0].write_bytes(b"")
    assert filled(tmp_path / "again", 2, HDF5Format()) == [None, None]
    _require_same_cache(tmp_path / "again", tmp_path / "one", HDF5Format())


def test_an_unfinished_part_is_not_absorbed(tmp_path: Path) -> None:
    part = HDF5Format().create(tmp_path / "part", HEADER)
    whole = HDF5Format().create(tmp_path / "whole", HEADER)
    with pytest.raises(CacheError, match="unfinished"):
        whole.absorb(tmp_path / "part")
    part.close()
    whole.close()


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


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "_VISIBLE_SECONDS", 0.1)
    for rank in range(2):
        (tmp_path / str(rank) / "runs").mkdir(parents=True)
    first, second = together(2, lambda crew: crew.require_shared(tmp_path / str(crew.rank) / "runs"))
    assert "Worker 1 does not see the files of the first worker" in str(second)
    assert isinstance(first, StageError)
    assert together(2, lambda crew: crew.require_shared(tmp_path / "0" / "runs")) == [None, None]
    assert list((tmp_path / "0" / "runs").iterdir()) == []


def test_a_stop_is_no_failure() -> None:
    """The others were asked to stop too, and may be saving what they have."""

    def work(crew: Crew) -> str:
        if crew.rank == 1:
            crew.fail(KeyboardInterrupt())
            return "left"
        with pytest.raises(StageError, match="it was asked to stop"):
            crew.told_by_first("never") if not crew.first else crew.gather("never", 1)
        return "heard"

    assert together(2, work) == ["heard", "left"]


def test_progress_is_that_of_all(caplog: pytest.LogCaptureFixture) -> None:
    def work(crew: Crew) -> None:
        with crew.progress(30, "work", "pieces", done=3) as progress:
            for _ in range(9 * (crew.rank + 1)):
                progress.advance()

    with caplog.at_level("INFO"):
        together(2, work)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["work: 30 of 30 pieces"]
