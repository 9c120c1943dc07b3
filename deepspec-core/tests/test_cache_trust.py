"""A cache that others wrote, or are writing, or that the disk has no room for."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from attrs import evolve

from deepspec_core.cache.binary_v2 import BinaryV2Format
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cache.manifest_digest import reseal
from deepspec_core.cache.shard_file import ShardOutput
from deepspec_core.cache.sharded import ShardedFormat, ShardedReader
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.digests import digest_of
from deepspec_core.errors import CacheError
from deepspec_core.features.cached import CachedFeatures

HEADER = CacheHeader(
    target="t", revision="r", adapter="a", taps=(0, 2), hidden_size=4, vocab_size=50, dtype="float32", tokenizer="k",
    template="m", max_length=5000, source="s", plugins={},
)  # fmt: skip


def _sample(index: int, length: int = 5) -> Sample:
    draw = torch.Generator().manual_seed(index)
    features = TargetFeatures(
        hidden=torch.randn(length, 8, generator=draw), last_hidden=torch.randn(length, 4, generator=draw)
    )
    ids = torch.arange(length)
    return Sample(id=str(index), input_ids=ids, loss_mask=ids > 1, original_length=length, features=features)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A finished cache of one shard."""
    writer = HDF5Format().create(tmp_path / "cache", HEADER)
    for index in range(3):
        writer.write(_sample(index))
    writer.finish()
    return tmp_path / "cache"


def opened(path: Path, header: CacheHeader) -> ShardedReader:
    """A reader of a cache that is as it was written."""
    assert HDF5Format().verify(path) == []
    return HDF5Format().open(path, header)


def _external(file: Any, folder: Path) -> None:
    outside = folder.parent / "secret.bin"
    outside.write_bytes(bytes(15 * 8 * 4))
    del file["hidden"]
    file.create_dataset("hidden", shape=(15, 8), dtype="<f4", external=[(str(outside), 0, h5py.h5f.UNLIMITED)])


def _external_link(file: Any, folder: Path) -> None:
    other = folder.parent / "other.h5"
    with h5py.File(other, "w") as outside:
        outside["hidden"] = np.zeros((15, 8), "<f4")
    del file["hidden"]
    file["hidden"] = h5py.ExternalLink(str(other), "hidden")


def _soft_link(file: Any, folder: Path) -> None:
    file.move("hidden", "elsewhere")
    file["hidden"] = h5py.SoftLink("/elsewhere")


def _virtual(file: Any, folder: Path) -> None:
    other = folder.parent / "other.h5"
    with h5py.File(other, "w") as outside:
        outside["hidden"] = np.zeros((15, 8), "<f4")
    layout = h5py.VirtualLayout(shape=(15, 8), dtype="<f4")
    layout[:] = h5py.VirtualSource(str(other), "hidden", shape=(15, 8))
    del file["hidden"]
    file.create_virtual_dataset("hidden", layout)


def _shorter(file: Any, folder: Path) -> None:
    file["hidden"].resize(9, axis=0)


def _group(file: Any, folder: Path) -> None:
    del file["loss_mask"]
    file.create_group("loss_mask")


def _missing(file: Any, folder: Path) -> None:
    del file["last_hidden"]


def _other_type(file: Any, folder: Path) -> None:
    del file["hidden"]
    file["hidden"] = np.zeros((15, 8), "<f8")


def _offsets(file: Any, folder: Path) -> None:
    file["offsets"][1] = 7


def _compressed(file: Any, folder: Path) -> None:
    values = file["hidden"][:]
    del file["hidden"]
    file.create_dataset("hidden", data=values, chunks=values.shape, compression="gzip")


@pytest.mark.parametrize(
    "change",
    [_compressed, _external, _external_link, _soft_link, _virtual, _shorter, _group, _missing, _other_type, _offsets],
)
def test_a_shard_that_is_not_what_the_manifest_says_is_refused(cache: Path, change: Callable[..., None]) -> None:
    shard = cache / "shard-00000.h5"
    with h5py.File(shard, "r+") as file:
        change(file, cache)
    manifest = cache / "manifest.json"
    text = manifest.read_text()
    before = text.split('"bytes": ')[1].split(",")[0]
    manifest.write_text(text.replace(f'"bytes": {before}', f'"bytes": {shard.stat().st_size}'))
    reseal(manifest)
    reader = HDF5Format().open(cache, HEADER)
    with pytest.raises(CacheError, match="does not match the manifest"):
        reader[0]
    # With a checksum that fits, it is still found before anything is read.
    checksum = json.loads(manifest.read_text())["shards"][0]["xxh3"]
    manifest.write_text(manifest.read_text().replace(checksum, digest_of(shard)))
    reseal(manifest)
    (problem,) = HDF5Format().verify(cache)
    assert "does not match the manifest" in problem.problem


def test_flipped_bytes_are_found_when_the_cache_is_verified(cache: Path) -> None:
    shard = cache / "shard-00000.h5"
    data = bytearray(shard.read_bytes())
    data[-2000:-1000] = os.urandom(1000)
    shard.write_bytes(data)
    HDF5Format().open(cache, HEADER)
    (problem,) = HDF5Format().verify(cache)
    assert "damaged" in problem.problem


def test_a_feature_that_is_not_finite_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    """Attention spreads it over the sequence, so that a weight of 0 does not keep it from the loss."""
    sample = _sample(0)
    assert sample.features is not None
    sample.features.hidden[0, 3] = float("nan")
    writer = HDF5Format().create(tmp_path, HEADER)
    writer.write(sample)
    writer.finish()
    with pytest.raises(CacheError, match=r"(?s)not finite.*sample 0"):
        CachedFeatures(HDF5Format().open(tmp_path, HEADER))[0]


def test_a_token_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    sample = _sample(0)
    sample.input_ids[2] = HEADER.vocab_size
    writer = HDF5Format().create(tmp_path, HEADER)
    writer.write(sample)
    writer.finish()
    with pytest.raises(CacheError, match=r"(?s)not in the target's vocabulary.*sample 0.*50.*0 to 49"):
        CachedFeatures(HDF5Format().open(tmp_path, HEADER))[0]


def test_a_second_writer_is_refused_and_the_first_one_loses_nothing(tmp_path: Path) -> None:
    writer = HDF5Format().create(tmp_path, HEADER, shard_samples=2)
    writer.write(_sample(0))
    script = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2]); from test_cache_trust import HEADER, HDF5Format; "
        "HDF5Format().create(pathlib.Path(sys.argv[1]), HEADER)"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode != 0
    assert "StageError: Another process is writing this cache" in second.stderr
    writer.write(_sample(1))
    writer.finish()
    reader = opened(tmp_path, HEADER)
    for index in range(2):
        found, expected = reader[index].features, _sample(index).features
        assert found is not None
        assert expected is not None
        assert torch.equal(found.hidden, expected.hidden)
    HDF5Format().create(tmp_path, HEADER).close()  # the lock is free again


def test_an_error_lets_go_of_the_cache(tmp_path: Path) -> None:
    writer = HDF5Format().create(tmp_path, HEADER)
    writer.write(_sample(0))
    writer.close()
    assert [path.name for path in tmp_path.glob("shard*")] == []
    with pytest.raises(CacheError, match="another max_length"):
        HDF5Format().create(tmp_path, CacheHeader(**{**HEADER.as_json(), "taps": HEADER.taps, "max_length": 9}))
    HDF5Format().create(tmp_path, HEADER).close()


_FILL = """
import os, resource, sys, pathlib
sys.path.insert(0, sys.argv[2])
import torch
from test_cache_trust import HEADER, HDF5Format, _sample
from deepspec_core.errors import CacheError

def fill(folder, limit):
    # A file that may not grow takes the place of a full disk; both refuse the same write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    writer = HDF5Format().create(folder, HEADER, shard_samples=8)
    try:
        for index in range(4000):
            writer.write(_sample(index, length=500))
        writer.finish()
    except CacheError as error:
        print(error.problem)
        sys.exit(2)

for limit in sys.argv[3:]:
    child = os.fork()
    if not child:
        fill(pathlib.Path(sys.argv[1]) / limit, int(limit))
        sys.exit(0)
    print(f"{limit}: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
"""
_LIMITS = ("1000", "60000", "300000", "1000000")


def test_a_full_disk_is_one_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    """Each limit in a process of its own, all forked from one that has imported everything."""
    command = [sys.executable, "-c", _FILL, str(tmp_path), str(Path(__file__).parent), *_LIMITS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"The cache cannot be written\n{limit}: 2\n" for limit in _LIMITS)
    for limit in _LIMITS:
        folder = tmp_path / limit
        assert not list(folder.glob("*.partial"))
        # With room it goes on from the sealed shards.
        writer = HDF5Format().create(folder, HEADER, shard_samples=8)
        for index in range(10):
            if str(index) not in writer.written():
                writer.write(_sample(index, length=500))
        writer.finish()
        assert len(opened(folder, HEADER)) == 10


def test_what_did_not_fit_is_read_back_while_the_file_is_closed(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = ShardOutput(tmp_path / "shard")
    output.write(b"abcdef")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
    try:
        output.seek(4)
        output.write(b"EFGH")
        output.seek(2)
        assert output.read(8) == b"cdEFGH\0\0"
        with pytest.raises(OSError, match="File too large"):
            output.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        output.close()
    with pytest.raises(FileExistsError):
        ShardOutput(tmp_path / "shard")


@pytest.mark.parametrize("cache_format", [HDF5Format(), BinaryV2Format()])
def test_a_shard_that_is_cut_short_while_it_is_read_is_told(tmp_path: Path, cache_format: ShardedFormat) -> None:
    """Reading the mapped file behind its end would end the process by SIGBUS."""
    writer = cache_format.create(tmp_path, evolve(HEADER, dtype="bfloat16", precision="bfloat16"))
    for index in range(3):
        writer.write(_sample(index, 2000))
    writer.finish()
    reader = cache_format.open(tmp_path, None)
    assert reader[0].features is not None
    shard = next(tmp_path.glob("shard-*"))
    os.truncate(shard, shard.stat().st_size // 8)
    with pytest.raises(CacheError, match="cut short while it was read"):
        reader[2]
