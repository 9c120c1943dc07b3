"""What a converted cache says of the way its features took, and that two caches are never mixed in one."""

from pathlib import Path

import pytest
import torch
from attrs import evolve

from deepspec_core.cache.conversion import convert
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.contracts.cache import CacheHeader, CacheReader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import CacheError

HEADER = CacheHeader(
    target="t", revision="r", adapter="a", taps=(2,), hidden_size=4, vocab_size=50, dtype="bfloat16", tokenizer="k",
    template="m", max_length=64, source="s", plugins={},
)  # fmt: skip
FORMAT = HDF5Format()


def _cache(folder: Path, seed: int) -> CacheReader:
    draw, ids = torch.Generator().manual_seed(seed), torch.arange(5)
    writer = FORMAT.create(folder, HEADER)
    for number in range(4):
        hidden, last = (torch.randn(5, 4, generator=draw).bfloat16() for _ in range(2))
        features = TargetFeatures(hidden=hidden, last_hidden=last)
        writer.write(
            Sample(id=f"{number}", input_ids=ids, loss_mask=ids > 1, original_length=5, features=features),
        )
    writer.finish()
    return FORMAT.open(folder, None)


def test_a_cache_says_how_coarsely_its_features_were_rounded(tmp_path: Path) -> None:
    source = _cache(tmp_path / "source", 0)
    for name, dtype in (("coarse", "float8_e4m3"), ("back", "bfloat16"), ("again", "float32")):
        convert(source, FORMAT, tmp_path / name, dtype=dtype)
        source = FORMAT.open(tmp_path / name, None)
        assert (source.header.dtype, source.header.precision) == (dtype, "float8_e4m3")
    FORMAT.open(tmp_path / "coarse", evolve(HEADER, dtype="float8_e4m3", precision="float8_e4m3"))
    with pytest.raises(CacheError, match="precision = float8_e4m3"):
        FORMAT.open(tmp_path / "back", HEADER)


def test_what_keeps_every_bit_is_read_as_the_cache_it_came_from(tmp_path: Path) -> None:
    convert(_cache(tmp_path / "source", 0), FORMAT, tmp_path / "same", dtype="bfloat16")
    assert FORMAT.open(tmp_path / "same", HEADER).header.precision == "bfloat16"
    assert "precision" not in HEADER.as_json()


class _Killed(Exception):
    pass


def test_a_conversion_goes_on_from_the_same_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _cache(tmp_path / "first", 0), _cache(tmp_path / "second", 1)
    read, out = type(first).__getitem__, tmp_path / "out"

    def until_the_third(self: CacheReader, index: int) -> Sample:
        if index == 2:
            raise _Killed
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(type(first), "__getitem__", until_the_third)
        with pytest.raises(_Killed):
            convert(first, FORMAT, out, dtype="bfloat16", shard_samples=1)
    with pytest.raises(CacheError, match="not converted from this one"):
        convert(second, FORMAT, out, dtype="bfloat16")
    with pytest.raises(CacheError, match="was not converted"):
        convert(second, FORMAT, tmp_path / "first", dtype="bfloat16")
    assert convert(first, FORMAT, out, dtype="bfloat16") == 2
    converted = FORMAT.open(out, HEADER)
    for index in range(4):
        found, expected = converted[index].features, first[index].features
        assert found is not None
        assert expected is not None
        assert torch.equal(found.hidden, expected.hidden)
