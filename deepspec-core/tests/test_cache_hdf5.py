"""The cache gives back what was put in, survives being killed, and refuses to be read as something it is not."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from attrs import evolve

from deepspec_core.cache.counting import samples_with
from deepspec_core.cache.estimate import cache_bytes, require_space
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cache.manifest_digest import sealed
from deepspec_core.contracts.cache import CacheFormat, CacheHeader, CacheReader, CacheWriter
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.disk import in_words
from deepspec_core.dtypes import torch_dtype
from deepspec_core.errors import CacheError

HEADER = CacheHeader(
    target="builtin:tiny",
    revision="abc",
    adapter="tiny",
    taps=(0, 2),
    hidden_size=8,
    vocab_size=64,
    dtype="float32",
    tokenizer="tok",
    template="tem",
    max_length=32,
    source="src",
    plugins={"deepspec-core": "0.1.0"},
)


def make_sample(index: int, dtype: torch.dtype = torch.float32) -> Sample:
    generator = torch.Generator().manual_seed(index)
    length = 3 + index % 5
    hidden = torch.randn(length, 16, generator=generator).to(dtype)
    hidden[:, 8:] *= 1000
    return Sample(
        id=f"sample-{index}",
        input_ids=torch.randint(64, (length,), generator=generator),
        loss_mask=torch.rand(length, generator=generator) > 0.5,
        original_length=length + index,
        features=TargetFeatures(hidden=hidden, last_hidden=torch.randn(length, 8, generator=generator).to(dtype)),
    )


def _fill(path: Path, count: int, header: CacheHeader = HEADER, shard_samples: int = 4) -> None:
    writer = HDF5Format().create(path, header, shard_samples=shard_samples)
    for index in range(count):
        sample = make_sample(index, torch_dtype(header.dtype) if header.dtype != "float8_e4m3" else torch.float32)
        if sample.id not in writer.written():
            writer.write(sample)
    writer.finish()


def opened(path: Path, header: CacheHeader):
    """A reader of a cache that is as it was written."""
    assert HDF5Format().verify(path) == []
    return HDF5Format().open(path, header)


def _same(one: Sample, other: Sample) -> None:
    assert one.id == other.id
    assert one.original_length == other.original_length
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.loss_mask, other.loss_mask)
    assert one.input_ids.dtype == other.input_ids.dtype
    for name in ("hidden", "last_hidden"):
        left, right = getattr(one.features, name), getattr(other.features, name)
        assert left.dtype == right.dtype
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_samples_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    header = evolve(HEADER, dtype=dtype)
    _fill(tmp_path, 10, header)
    reader = opened(tmp_path, header)
    assert len(reader) == 10
    assert reader.header == header
    assert reader.lengths() == [len(make_sample(index).input_ids) for index in range(10)]
    for index in (9, 0, 5, 4, 3, 9):
        _same(reader[index], make_sample(index, torch_dtype(dtype)))
        bare = reader.tokens_of(index)
        assert bare.features is None
        _same(evolve(bare, features=reader[index].features), reader[index])
    with pytest.raises(IndexError):
        reader[10]


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3"])
def test_without_taps_only_the_last_hidden_state_is_stored(tmp_path: Path, dtype: str) -> None:
    header = evolve(HEADER, taps=(), dtype=dtype)
    writer = HDF5Format().create(tmp_path, header)
    for sample in map(make_sample, range(3)):
        assert sample.features is not None
        writer.write(evolve(sample, features=evolve(sample.features, hidden=sample.features.hidden[:, :0])))
    writer.finish()
    for index, read in enumerate(opened(tmp_path, header)):
        sample = make_sample(index)
        assert read.features.hidden.shape == (len(sample.input_ids), 0)
        near = 0 if dtype == "float32" else 0.1
        torch.testing.assert_close(read.features.last_hidden.float(), sample.features.last_hidden, rtol=near, atol=near)


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    header = evolve(HEADER, dtype="bfloat16")
    sample = make_sample(0, torch.bfloat16)
    sample.features.hidden[0, :4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40])
    writer = HDF5Format().create(tmp_path, header)
    writer.write(sample)
    writer.finish()
    _same(HDF5Format().open(tmp_path, header)[0], sample)


def test_eight_bits_scale_each_token_and_layer(tmp_path: Path) -> None:
    header = evolve(HEADER, dtype="float8_e4m3")
    _fill(tmp_path, 6, header)
    reader = HDF5Format().open(tmp_path, header)
    for index in range(6):
        read, original = reader[index].features, make_sample(index).features
        assert read.hidden.dtype == torch.bfloat16
        for got, wanted in ((read.hidden, original.hidden), (read.last_hidden, original.last_hidden)):
            # 3 bits of mantissa: half a step is 1/16; the second layer is a thousand times the first.
            groups = wanted.reshape(len(wanted), -1, 8)
            floor = groups.abs().amax(-1, keepdim=True) * 2**-15
            assert ((got.float().reshape_as(groups) - groups).abs() <= groups.abs() / 16 + floor).all()
    assert HDF5Format().bytes_per_token(header) == 24 + 3 * 4 + 5


def test_it_fulfils_the_contracts(tmp_path: Path) -> None:
    cache_format = HDF5Format()
    assert isinstance(cache_format, CacheFormat)
    writer = cache_format.create(tmp_path, HEADER)
    assert isinstance(writer, CacheWriter)
    writer.finish()
    assert isinstance(cache_format.open(tmp_path, None), CacheReader)


def test_readers_can_be_pickled_and_forked(tmp_path: Path) -> None:
    _fill(tmp_path, 10)
    reader = HDF5Format().open(tmp_path, HEADER)
    _same(reader[1], make_sample(1))
    _same(pickle.loads(pickle.dumps(reader))[8], make_sample(8))
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        lengths = pool.map(_ReadLength(reader), range(10))
    assert lengths == reader.lengths()


class _ReadLength:
    def __init__(self, reader) -> None:
        self.reader = reader

    def __call__(self, index: int) -> int:
        return len(self.reader[index].input_ids)


_SLOW_WRITER = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("cache_tests", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
writer = tests.HDF5Format().create(Path(sys.argv[2]), tests.HEADER, shard_samples=4)
for index in range(100):
    writer.write(tests.make_sample(index))
    time.sleep(0.02)
"""


def test_a_killed_writer_loses_at_most_its_open_shard(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "-c", _SLOW_WRITER, __file__, str(killed)])
    deadline = time.monotonic() + 60
    while not list(killed.glob("shard-00002.h5.*.partial")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(killed.glob("shard-00002.h5.*.partial"))

    with pytest.raises(CacheError, match=r"(?s)unfinished.*8 samples in 2 sealed"):
        HDF5Format().open(killed, HEADER)
    writer = HDF5Format().create(killed, HEADER, shard_samples=4)
    assert writer.written() == {f"sample-{index}" for index in range(8)}
    assert not list(killed.glob("*.partial"))
    writer.close()
    _fill(killed, 18)
    _fill(whole, 18)
    continued, uninterrupted = opened(killed, HEADER), HDF5Format().open(whole, HEADER)
    assert continued.ids() == uninterrupted.ids()
    for index in range(18):
        _same(continued[index], uninterrupted[index])


def test_a_complete_cache_that_grows_is_unfinished_until_it_is_not(tmp_path: Path) -> None:
    _fill(tmp_path, 4)
    writer = HDF5Format().create(tmp_path, HEADER)
    assert len(writer.written()) == 4
    HDF5Format().open(tmp_path, HEADER)
    writer.write(make_sample(4))
    with pytest.raises(CacheError, match="unfinished"):
        HDF5Format().open(tmp_path, HEADER)
    writer.finish()
    _same(HDF5Format().open(tmp_path, HEADER)[4], make_sample(4))


def test_a_cache_keeps_how_many_samples_have_a_token_until_it_grows(tmp_path: Path) -> None:
    samples = [make_sample(index) for index in range(6)]
    token = int(samples[0].input_ids[0])
    having = sum(bool((one.input_ids == token).any()) for one in samples)
    _fill(tmp_path, 6)
    uncounted = HDF5Format().open(tmp_path, HEADER)
    assert uncounted.samples_with(token) is None
    assert samples_with(uncounted, token) == having
    for count in (having, 4):  # what was noted is believed, and not counted again
        writer = HDF5Format().create(tmp_path, HEADER)
        writer.note_samples_with(token, count)
        writer.finish()
        assert samples_with(HDF5Format().open(tmp_path, HEADER), token) == count
    writer = HDF5Format().create(tmp_path, HEADER)
    writer.write(make_sample(6))
    writer.finish()
    assert HDF5Format().open(tmp_path, HEADER).samples_with(token) is None


def test_a_shard_renamed_but_not_in_the_manifest_does_not_count(tmp_path: Path) -> None:
    writer = HDF5Format().create(tmp_path, HEADER, shard_samples=2)
    for index in range(4):
        writer.write(make_sample(index))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"].pop()
    (tmp_path / "manifest.json").write_text(json.dumps(sealed(manifest)))
    del writer  # as a kill does, without closing
    _fill(tmp_path, 4, shard_samples=2)
    reader = opened(tmp_path, HEADER)
    assert reader.ids() == [f"sample-{index}" for index in range(4)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("target", "other/model"), ("taps", (0, 1)), ("dtype", "bfloat16"), ("template", "x"), ("max_length", 64)],
)
def test_a_cache_made_for_something_else_is_refused(tmp_path: Path, field: str, value: object) -> None:
    _fill(tmp_path, 3)
    other = evolve(HEADER, **{field: value})
    for use in (HDF5Format().open, HDF5Format().create):
        with pytest.raises(CacheError) as caught:
            use(tmp_path, other)
        assert f"{field} = {getattr(HEADER, field)}" in str(caught.value)
        assert f"{field} = {value}" in str(caught.value)
    assert len(HDF5Format().open(tmp_path, evolve(HEADER, plugins={"deepspec-core": "9"}))) == 3


def test_damage_is_found(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache"):
        HDF5Format().open(tmp_path / "nowhere", HEADER)
    sound = tmp_path / "sound"
    _fill(sound, 6)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(sound, tmp_path / name))

    flipped = copy("flipped")
    content = bytearray((flipped / "shard-00001.h5").read_bytes())
    content[len(content) // 2] ^= 1
    (flipped / "shard-00001.h5").write_bytes(content)
    HDF5Format().open(flipped, HEADER)
    (problem,) = HDF5Format().verify(flipped)
    assert re.search(r"(?s)damaged.*shard-00001.*checksum", str(problem))
    assert [len(HDF5Format().verify(flipped, part=part, parts=2)) for part in range(2)] == [0, 1]

    cut = copy("cut")
    (cut / "shard-00000.h5").write_bytes((sound / "shard-00000.h5").read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"(?s)damaged.*shard-00000.*bytes"):
        HDF5Format().open(cut, HEADER)

    missing = copy("missing")
    (missing / "shard-00000.h5").unlink()
    with pytest.raises(CacheError, match=r"(?s)missing.*shard-00000"):
        HDF5Format().open(missing, HEADER)

    for name, edit in (("text", "{"), ("outside", None)):
        broken = copy(name)
        manifest = json.loads((broken / "manifest.json").read_text())
        manifest["shards"][0]["file"] = "../sound/shard-00000.h5"
        (broken / "manifest.json").write_text(edit or json.dumps(sealed(manifest)))
        with pytest.raises(CacheError, match="manifest is damaged"):
            HDF5Format().open(broken, HEADER)


def test_a_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = cache_bytes(HDF5Format(), HEADER, 10**9)
    assert needed == 10**9 * (24 * 4 + 5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**13, 0, 2_500_000_000))
    with pytest.raises(CacheError, match=r"(?s)2\.5 GB free.*101\.0 GB"):
        require_space(tmp_path / "not" / "yet", needed)
    require_space(tmp_path, 2_000_000_000)
    assert in_words(38.2e12) == "38.2 TB"


def test_a_disk_that_fills_up_is_a_cache_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = HDF5Format().create(tmp_path, HEADER, shard_samples=1)
    writer.write(make_sample(0))

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("deepspec_core.cache.chunked_rows.GrownRows.append", full)
        with pytest.raises(CacheError, match="No space left"):
            writer.write(make_sample(1))
    _fill(tmp_path, 3, shard_samples=1)
    assert len(HDF5Format().open(tmp_path, HEADER)) == 3


def test_the_estimate_is_close(tmp_path: Path) -> None:
    header = evolve(HEADER, max_length=400, hidden_size=256, taps=(0, 1, 2))
    writer = HDF5Format().create(tmp_path, header)
    for index in range(8):
        features = TargetFeatures(hidden=torch.randn(400, 768), last_hidden=torch.randn(400, 256))
        ids = torch.arange(400)
        writer.write(Sample(id=str(index), input_ids=ids, loss_mask=ids > 3, original_length=400, features=features))
    writer.finish()
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    # The last chunk of each of four arrays is not full, once a shard.
    assert 0 < written - cache_bytes(HDF5Format(), header, 3200) < 4 * 256 * 1024
