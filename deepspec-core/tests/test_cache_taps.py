"""A draft with fewer taps reads them alone from a cache that has more: the bytes that a cache of its own would hold."""

from __future__ import annotations

import pickle
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from attrs import evolve

from deepspec_core.cache.binary_v2 import BinaryV2Format
from deepspec_core.cache.chunked_rows import ChunkedRows, GrownRows, MappedFile
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cache.taps import FewerTaps, of_taps, runs
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.dtypes import torch_dtype

TAPS, SIZE, LENGTHS = (1, 3, 5, 7, 9, 11, 13, 15), 256, (150, 1, 90)
FORMATS = [(HDF5Format, "float32"), (HDF5Format, "bfloat16"), (HDF5Format, "float8_e4m3"), (BinaryV2Format, "bfloat16")]


def header(dtype: str, taps: tuple[int, ...]) -> CacheHeader:
    return CacheHeader(
        target="t", revision="r", adapter="a", taps=taps, hidden_size=SIZE, vocab_size=50, dtype=dtype, tokenizer="k",
        template="m", max_length=500, source="s", plugins={},
    )  # fmt: skip


def samples(dtype: str, taps: tuple[int, ...]) -> list[Sample]:
    kept = torch.float32 if dtype == "float8_e4m3" else torch_dtype(dtype)
    made = []
    for number, length in enumerate(LENGTHS):
        drawn = torch.Generator().manual_seed(number)
        hidden_TLH = torch.randn(length, len(TAPS), SIZE, generator=drawn).to(kept)
        of = torch.cat([hidden_TLH[:, TAPS.index(tap)] for tap in taps], dim=1) if taps else hidden_TLH[:, 0, :0]
        last = torch.randn(length, SIZE, generator=drawn).to(kept)
        ids = torch.arange(length) % 50
        features = TargetFeatures(hidden=of, last_hidden=last)
        made.append(Sample(id=str(number), input_ids=ids, loss_mask=ids > 1, original_length=length, features=features))
    return made


def written(folder: Path, kind: Any, dtype: str, taps: tuple[int, ...]) -> Any:
    """A finished cache, opened."""
    writer = kind().create(folder, header(dtype, taps), shard_samples=2)
    for sample in samples(dtype, taps):
        writer.write(sample)
    writer.finish()
    return kind().open(folder, header(dtype, taps))


def bits(sample: Sample) -> list[bytes]:
    assert sample.features is not None
    parts = (sample.features.hidden, sample.features.last_hidden)
    # float32 holds every stored value, and nothing is lost by the way.
    return [f"{part.dtype} {part.shape}".encode() + part.float().numpy().tobytes() for part in parts]


def test_runs_of_layers() -> None:
    assert runs((0, 1, 2, 5, 7, 8)) == [(0, 3), (5, 6), (7, 9)]
    assert runs((4,)) == [(4, 5)]
    assert runs(()) == [(0, 0)]


@pytest.mark.parametrize(("kind", "dtype"), FORMATS)
@pytest.mark.parametrize("taps", [(3,), (1, 5, 7, 15), (), TAPS])
def test_fewer_taps_are_the_bytes_of_a_cache_of_their_own(
    tmp_path: Path, kind: Any, dtype: str, taps: tuple[int, ...]
) -> None:
    large, own = written(tmp_path / "large", kind, dtype, TAPS), written(tmp_path / "own", kind, dtype, taps)
    for narrowed in (of_taps(large, taps), FewerTaps(large, taps), pickle.loads(pickle.dumps(of_taps(large, taps)))):
        assert narrowed.header == evolve(large.header, taps=taps)
        assert (len(narrowed), narrowed.ids(), narrowed.lengths()) == (3, own.ids(), own.lengths())
        for index in range(3):
            assert bits(narrowed[index]) == bits(own[index])
            assert torch.equal(narrowed.tokens_of(index).input_ids, own[index].input_ids)
    assert large.header.taps == TAPS


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel counts what a process reads")
def test_the_other_taps_are_not_read(tmp_path: Path) -> None:
    large = written(tmp_path / "cache", HDF5Format, "float32", TAPS)

    def read_by(reader: Any) -> int:
        """Bytes that the process reads for the longest sample."""
        _ = reader[1]  # opens the shard and reads what is about the file
        before = _read_so_far()
        _ = reader[0]
        return _read_so_far() - before

    token = SIZE * 4
    assert read_by(of_taps(large, (3, 5))) < 150 * 2 * token + 20_000
    # Not counted is what is mapped into memory: last_hidden, and `hidden` where all of it is read.
    assert read_by(of_taps(large, TAPS[1:])) >= 150 * 7 * token


def _read_so_far() -> int:
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["rchar"])


@pytest.mark.parametrize("lengths", [(5,), (64, 64), (1, 63, 65, 200, 3), (129,)])
def test_rows_are_the_same_by_hdf5_and_where_they_lie(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """Chunks have 64 rows here: samples end within, at and beyond them."""
    rows = np.random.default_rng(0).integers(0, 2**16, (sum(lengths), 2048), dtype=np.uint16)
    ends = np.cumsum([0, *lengths]).tolist()
    with h5py.File(tmp_path / "x.h5", "w") as file:
        grown = GrownRows(file, "rows", rows)
        for begin, end in pairwise(ends):
            grown.append(rows[begin:end])
        grown.finish()
    with h5py.File(tmp_path / "x.h5", "r") as file:
        direct = ChunkedRows(file["rows"], MappedFile(tmp_path / "x.h5"))
        assert file["rows"].chunks == (64, 2048)
        assert np.array_equal(file["rows"][:], rows)
        for begin, end in [*pairwise(ends), (0, sum(lengths)), (0, 0)]:
            assert np.array_equal(direct.read(begin, end), rows[begin:end])
