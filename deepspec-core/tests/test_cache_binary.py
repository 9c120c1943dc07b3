"""The published binary layout: recorded caches are read, ours are laid out alike, and neither is trusted."""

import json
import struct
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from test_cache_hdf5 import HEADER, make_sample

from deepspec_core.cache.adoption import adopt, source_of
from deepspec_core.cache.binary_v2 import BinaryV2Format
from deepspec_core.cache.conversion import convert
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cache.manifest_digest import sealed
from deepspec_core.contracts.cache import CacheFormat, CacheHeader, CacheReader, CacheWriter
from deepspec_core.contracts.draft import Sample
from deepspec_core.errors import CacheError

BF16 = evolve(HEADER, dtype="bfloat16", precision="bfloat16")
RECORDED = Path(__file__).parents[2] / "tests" / "parity" / "cache-v2"
RECORDED_HEADER = evolve(BF16, taps=(1, 3, 5), hidden_size=32, max_length=64, vocab_size=100_000)


def _fill(path: Path, count: int, shard_samples: int = 4) -> None:
    writer = BinaryV2Format().create(path, BF16, shard_samples=shard_samples)
    for index in range(count):
        if f"sample-{index}" not in writer.written():
            writer.write(make_sample(index, torch.bfloat16))
    writer.finish()


def _same(one: Sample, other: Sample) -> None:
    assert (one.id, one.original_length) == (other.id, other.original_length)
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.loss_mask, other.loss_mask)
    assert one.features is not None
    assert other.features is not None
    for name in ("hidden", "last_hidden"):
        left, right = getattr(one.features, name), getattr(other.features, name)
        assert left.dtype == right.dtype
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def test_samples_come_back_bit_for_bit(tmp_path: Path) -> None:
    _fill(tmp_path, 10)
    assert BinaryV2Format().verify(tmp_path) == []
    reader = BinaryV2Format().open(tmp_path, BF16)
    assert [sample.id for sample in map(reader.__getitem__, range(10))] == reader.ids()
    for index in (9, 0, 5, 4, 3, 9):
        _same(reader[index], make_sample(index, torch.bfloat16))
    assert isinstance(BinaryV2Format(), CacheFormat)
    assert isinstance(reader, CacheReader)


def test_the_files_are_the_published_ones(tmp_path: Path) -> None:
    """Read here by nothing but the description of the layout."""
    _fill(tmp_path, 6)
    published = json.loads((tmp_path / "manifest.json").read_text())
    assert (published["version"], published["num_samples"], published["num_shards"]) == (2, 6, 2)
    assert published["index_record_size"] == 56
    assert published["target_layer_ids"] == [0, 2]
    index = (tmp_path / "samples.idx").read_bytes()
    for number in range(6):
        sample, shard, length, *offsets = struct.unpack("<QIIQQQQQ", index[56 * number :][:56])
        expected = make_sample(number, torch.bfloat16)
        assert expected.features is not None
        assert (sample, length) == (number, len(expected.input_ids))
        content = (tmp_path / published["shards"][shard]["file_name"]).read_bytes()
        sizes = (4 * length, length, length, 2 * length * 16, 2 * length * 8)
        parts = [content[begin : begin + size] for begin, size in zip(offsets, sizes, strict=True)]
        assert parts[0] == expected.input_ids.int().numpy().tobytes()
        assert parts[1] == b"\x01" * length
        assert parts[2] == expected.loss_mask.byte().numpy().tobytes()
        assert parts[3] == expected.features.hidden.view(torch.uint8).numpy().tobytes()
        assert parts[4] == expected.features.last_hidden.view(torch.uint8).numpy().tobytes()


def test_a_recorded_cache_is_adopted_and_read(tmp_path: Path) -> None:
    folder = _recorded(tmp_path)
    with pytest.raises(CacheError, match="adopt"):
        BinaryV2Format().open(folder, None)
    adopt(folder, RECORDED_HEADER)
    assert BinaryV2Format().verify(folder, remembered=False) == []
    reader = BinaryV2Format().open(folder, RECORDED_HEADER)
    expected = load_file(RECORDED.with_name("cache-v2.expected.safetensors"))
    assert reader.lengths() == [9, 17, 5, 23, 12]
    for index in range(5):
        sample = reader[index]
        assert sample.features is not None
        assert (sample.id, sample.original_length) == (str(index), reader.lengths()[index])
        assert torch.equal(sample.input_ids, expected[f"{index}.input_ids"])
        assert torch.equal(sample.loss_mask.long(), expected[f"{index}.loss_mask"])
        assert torch.equal(sample.features.hidden, expected[f"{index}.target_hidden_states"])
        assert torch.equal(sample.features.last_hidden, expected[f"{index}.target_last_hidden_states"])


def _recorded(tmp_path: Path) -> Path:
    folder = tmp_path / "recorded"
    folder.mkdir()
    for file in RECORDED.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": (1, 3)}, "target_layer_ids"),
        ({"hidden_size": 16}, "hidden_size"),
        ({"max_length": 128}, "max_length"),
    ],
)
def test_a_cache_of_something_else_is_not_adopted(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = _recorded(tmp_path)
    with pytest.raises(CacheError, match=message):
        adopt(folder, evolve(RECORDED_HEADER, **change))
    assert not (folder / "deepspec.json").exists()


@pytest.mark.parametrize("fault", ["outside", "short", "index", "order", "missing", "twice", "layout"])
def test_a_damaged_cache_is_not_adopted(tmp_path: Path, fault: str) -> None:
    folder = _recorded(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    shard, index = folder / "shard-00001.bin", folder / "samples.idx"
    if fault == "outside":
        manifest["shards"][1]["file_name"] = "../shard-00001.bin"
    elif fault == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif fault == "index":
        index.write_bytes(index.read_bytes()[:-3])
    elif fault == "order":
        rows = index.read_bytes()
        index.write_bytes(rows[56:112] + rows[:56] + rows[112:])
    elif fault == "missing":
        shard.unlink()
    elif fault == "twice":
        adopt(folder, RECORDED_HEADER)
    else:
        manifest["token_dtype"] = "int64"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError):
        adopt(folder, RECORDED_HEADER)


def test_the_source_of_an_adopted_cache_is_its_index(tmp_path: Path) -> None:
    folder = _recorded(tmp_path)
    before = source_of(folder)
    index = folder / "samples.idx"
    index.write_bytes(index.read_bytes()[:-56])
    assert before != source_of(folder)


@pytest.mark.parametrize(
    ("file", "position"), [("shard-00000.bin", 70), ("samples.idx", 60), ("manifest.json", 4), ("shard-00001.bin", -3)]
)
def test_a_flipped_bit_is_found(tmp_path: Path, file: str, position: int) -> None:
    _fill(tmp_path, 6)
    content = bytearray((tmp_path / file).read_bytes())
    content[position] ^= 1
    (tmp_path / file).write_bytes(content)
    problems = BinaryV2Format().verify(tmp_path, remembered=False)
    assert problems
    assert all(file in str(problem) for problem in problems)


def test_a_shard_that_does_not_fit_its_lengths_is_refused(tmp_path: Path) -> None:
    """Whoever made it also made the checksum fit."""
    _fill(tmp_path, 4)
    own = json.loads((tmp_path / "deepspec.json").read_text())
    own["shards"][0]["lengths"][0] += 1
    (tmp_path / "deepspec.json").write_text(json.dumps(sealed(own)))
    with pytest.raises(CacheError, match="does not match the manifest"):
        BinaryV2Format().open(tmp_path, BF16)[0]


def test_an_interrupted_writer_goes_on(tmp_path: Path) -> None:
    writer = BinaryV2Format().create(tmp_path, BF16, shard_samples=4)
    assert isinstance(writer, CacheWriter)
    for index in range(6):
        writer.write(make_sample(index, torch.bfloat16))
    writer.close()
    with pytest.raises(CacheError, match="unfinished"):
        BinaryV2Format().open(tmp_path, BF16)
    assert not list(tmp_path.glob("*.partial"))
    _fill(tmp_path, 10)
    _fill(tmp_path / "whole", 10)
    for file in (tmp_path / "whole").glob("s*"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_other_number_formats_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="bfloat16"):
        BinaryV2Format().create(tmp_path, HEADER)


def test_formats_do_not_mix_in_one_folder(tmp_path: Path) -> None:
    _fill(tmp_path / "binary", 2)
    HDF5Format().create(tmp_path / "hdf5", BF16).finish()
    BinaryV2Format().create(tmp_path / "begun", BF16).close()
    for other, folder in ((HDF5Format(), "binary"), (HDF5Format(), "begun"), (BinaryV2Format(), "hdf5")):
        for ask in (other.header, lambda path, other=other: other.create(path, BF16)):
            with pytest.raises(CacheError, match="another format"):
                ask(tmp_path / folder)


@pytest.mark.parametrize(("first", "second"), [(HDF5Format(), BinaryV2Format()), (BinaryV2Format(), HDF5Format())])
def test_conversion_keeps_every_bit(tmp_path: Path, first: CacheFormat, second: CacheFormat) -> None:
    _write(first, tmp_path / "one", BF16)
    reader = first.open(tmp_path / "one", BF16)
    assert convert(reader, second, tmp_path / "two", dtype="bfloat16", shard_samples=3) == 7
    assert second.verify(tmp_path / "two") == []
    converted = second.open(tmp_path / "two", BF16)
    for index in range(7):
        _same(converted[index], reader[index])
    assert convert(reader, second, tmp_path / "two", dtype="bfloat16", shard_samples=3) == 0


def test_conversion_goes_on_where_it_stopped(tmp_path: Path) -> None:
    _write(HDF5Format(), tmp_path / "one", BF16)
    reader = HDF5Format().open(tmp_path / "one", BF16)
    header = evolve(BF16, converted_from=reader.digest)
    begun = BinaryV2Format().create(tmp_path / "two", header, shard_samples=3)
    for index in range(4):
        begun.write(make_sample(index, torch.bfloat16))
    begun.close()
    assert convert(reader, BinaryV2Format(), tmp_path / "two", dtype="bfloat16", shard_samples=3) == 4
    assert BinaryV2Format().open(tmp_path / "two", BF16).ids() == reader.ids()


def test_conversion_to_fewer_bits_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(HDF5Format(), tmp_path / "one", HEADER)
    reader = HDF5Format().open(tmp_path / "one", HEADER)
    convert(reader, HDF5Format(), tmp_path / "two", dtype="float8_e4m3")
    assert "rounded from float32 to float8_e4m3" in caplog.text
    found = (
        HDF5Format().open(tmp_path / "two", evolve(HEADER, dtype="float8_e4m3", precision="float8_e4m3"))[1].features
    )
    original = make_sample(1).features
    assert found is not None
    assert original is not None
    torch.testing.assert_close(found.last_hidden.float(), original.last_hidden, rtol=1 / 16, atol=0.01)


def _write(cache_format: CacheFormat, folder: Path, header: CacheHeader) -> None:
    writer = cache_format.create(folder, header, shard_samples=4)
    for index in range(7):
        writer.write(make_sample(index, torch.bfloat16 if header is BF16 else torch.float32))
    writer.finish()
