"""The format keeps what it is given, goes on after a stop, and trusts no file. Public names of core only."""

import resource
from contextlib import closing
from pathlib import Path

import deepspec_npz_cache.plugin
import numpy as np
import pytest
from deepspec_npz_cache.npz import NpzFormat

from deepspec_core.cache.manifest import Shard
from deepspec_core.contracts.cache import CacheHeader, CacheWriter
from deepspec_core.contracts.draft import Sample
from deepspec_core.errors import CacheError
from deepspec_core.testing import CacheFormatSuite
from deepspec_core.testing.public_imports import check_public_imports
from deepspec_core.testing.random_batches import TAPS, features_of, random_sample

HEADER = CacheHeader(
    target="t", revision="", adapter="tiny", taps=TAPS, hidden_size=32, vocab_size=64, dtype="float32", tokenizer="",
    template="", max_length=64, source="", plugins={},
)  # fmt: skip
SEALED = Shard(file="shard-00000.npz", bytes=0, xxh3="0" * 32, ids=("s0", "s1"), lengths=(5, 8))
SAMPLES = [random_sample(f"s{index}", 5 + 3 * index, seed=index) for index in range(5)]


def written(path: Path, header: CacheHeader = HEADER, samples: list[Sample] = SAMPLES) -> Path:
    with closing(NpzFormat().create(path, header, shard_samples=2)) as writer:
        assert isinstance(writer, CacheWriter)
        for sample in samples:
            if sample.id not in writer.written():
                writer.write(sample)
        writer.finish()
    return path


def test_numpy_opens_a_shard(tmp_path: Path) -> None:
    with np.load(written(tmp_path / "cache") / "shard-00001.npz", allow_pickle=False) as shard:
        assert shard["original_length"].tolist() == [11, 14]
        assert np.array_equal(shard["1/hidden"], features_of(SAMPLES[3]).hidden)


class TestNpz(CacheFormatSuite):
    component = "npz"
    plugin = deepspec_npz_cache.plugin


class Instructions:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return print, ("unpickled",)


WIDTH = 32 * len(TAPS)
CHANGES = {
    "0/hidden: nothing": {"0/hidden": None},
    "float64": {"0/hidden": np.zeros((5, WIDTH))},
    "found:    0/hidden: float32 .6": {"0/hidden": np.zeros((6, WIDTH), dtype="<f4")},
    "object": {"0/hidden": np.array([Instructions()], dtype=object)},
    "original_length": {"original_length": np.zeros(1, dtype="<i8")},
}


@pytest.mark.parametrize(("says", "change"), CHANGES.items(), ids=CHANGES)
def test_another_content_is_refused(
    tmp_path: Path, says: str, change: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever made the shard may have made the manifest too: what is in the shard counts."""
    path = written(tmp_path / "cache") / "shard-00000.npz"
    with np.load(path) as stored:
        arrays = {**stored, **change}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(CacheError, match=says):
        NpzFormat().layout.open(path, HEADER, SEALED)
    assert "unpickled" not in capsys.readouterr().out


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    """A small file could ask for any memory."""
    path = written(tmp_path / "cache") / "shard-00000.npz"
    with np.load(path) as stored:
        np.savez_compressed(path, **stored)
    with pytest.raises(CacheError, match="compressed"):
        NpzFormat().layout.open(path, HEADER, SEALED)


def test_a_bit_that_flips(tmp_path: Path) -> None:
    path = written(tmp_path / "cache")
    shard = path / "shard-00000.npz"
    content = bytearray(shard.read_bytes())
    content[content.index(b"1/hidden.npy") + 2000] ^= 1
    shard.write_bytes(content)
    (problem,) = NpzFormat().verify(path)
    assert "shard-00000.npz" in str(problem)
    with pytest.raises(CacheError, match="Bad CRC-32"):
        NpzFormat().open(path, None)[1]


@pytest.mark.parametrize("most", [1_000, 40_000])
def test_a_full_disk(tmp_path: Path, most: int) -> None:
    """A file cannot grow further: one error, nothing half written is left, and a new writer goes on."""
    samples = [random_sample(f"x{index}", 30, seed=index) for index in range(4)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(CacheError, match="cannot be written"):
            written(tmp_path / "cache", samples=samples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("cache/shard*"))
    path = written(tmp_path / "cache", samples=samples)
    assert NpzFormat().verify(path) == []


def test_only_public_names_are_imported() -> None:
    check_public_imports(Path(__file__).parents[1])
