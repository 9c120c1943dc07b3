"""What workers tell each other, and a cache that several of them fill.

Features are computed in the same batches whoever computes them, so they are equal bit for bit.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_workers import COUNTS, Killed, quick, together  # noqa: F401

from deepspec_core import crew as crews
from deepspec_core.cache.binary_v2 import BinaryV2Format
from deepspec_core.cache.filling import Filling, fill
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.crew import Crew
from deepspec_core.errors import CacheError, StageError
from deepspec_core.features.capture import capture
from deepspec_core.testing.tiny_target import TinyTarget

pytestmark = pytest.mark.usefixtures("quick")

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

        def captured(done: Collection[str], _waiting: Callable[[], None]) -> Iterator[Sample]:
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


def test_the_first_sees_who_is_slow() -> None:
    def work(crew: Crew) -> list[float] | None:
        with crew.progress(30, "work", "pieces") as progress:
            for _ in range(10 * (crew.rank + 1)):
                progress.advance()
        return crew.by_rank("work") if crew.first else None

    seen = together(2, work)[0]
    assert seen[0] == 10
    # What the other one has told by now; it tells it in time, and the sum of all is told in the end.
    assert 0 <= seen[1] <= 20
    assert Crew().by_rank("work") == [0.0]
