"""A manifest is believed only where every value in it can be true."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec_core.cache import manifest as manifests
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cache.manifest import Manifest, Shard
from deepspec_core.cache.manifest_digest import sealed
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.errors import CacheError

HEADER = CacheHeader(
    target="t", revision="r", adapter="a", taps=(0, 2), hidden_size=4, vocab_size=50, dtype="float32", tokenizer="k",
    template="m", max_length=64, source="s", plugins={"core": "1"},
)  # fmt: skip
SHARDS = tuple(
    Shard(file=f"shard-{n}.h5", bytes=10, xxh3=f"{n}" * 32, ids=(f"{n}-a", f"{n}-b"), lengths=(3, 4)) for n in range(2)
)
WHOLE = Manifest(format="hdf5", header=HEADER, shards=SHARDS, complete=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def _written(folder: Path) -> Any:
    WHOLE.save(folder)
    return json.loads((folder / "manifest.json").read_text())


def _places(value: Any) -> list[tuple[Any, ...]]:
    """The path to every value of a JSON document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *rest) for key, inner in entries for rest in _places(inner))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_is_read_as_it_stands_or_refused(folder: Path, data: st.DataObject, value: Any) -> None:
    content = _written(folder)
    *path, last = data.draw(st.sampled_from([place for place in _places(content) if place]))
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = value
    (folder / "manifest.json").write_text(json.dumps(sealed(content)))
    try:
        found = manifests.load(folder, format="hdf5")
    except CacheError:
        return
    # What was read is written as it was: no value has become another one on the way.
    assert found is not None
    found.save(folder)
    assert (folder / "manifest.json").read_text() == json.dumps(sealed(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content.update(complete="yes"), "complete"),
        (lambda content: content["shards"][0].update(lengths=[3]), "2 samples and 1 lengths"),
        (lambda content: content["shards"][0].update(lengths=[3, -4]), "-4"),
        (lambda content: content["shards"][0].update(lengths=[3, True]), "lengths"),
        (lambda content: content["shards"][0].update(lengths=[3, 65]), "a sample of 65 tokens"),
        (lambda content: content["shards"][1].update(ids=["0-a", "x"]), "sample '0-a' is there twice"),
        (lambda content: content["shards"][1].update(file="shard-0.h5"), "file 'shard-0.h5' is there twice"),
        (lambda content: content["shards"][0].update(file="../x.h5"), "file"),
        (lambda content: content["shards"][0].update(file=".."), "lies outside the cache"),
        (lambda content: content["shards"][0].update(ids=["0-a", None]), "ids must be text"),
        (lambda content: content["shards"][0].update(ids=["0-a", "\ud800"]), "surrogates"),
        (lambda content: content.update(samples_with={"a": 1}), "'a'"),
        (lambda content: content.update(samples_with={"07": 1}), "'07', where a token id belongs"),
        (lambda content: content.update(samples_with={"7": -1}), "-1"),
        (lambda content: content.update(samples_with={"7": 5}), "5 of 4 samples have token 7"),
        (lambda content: content["header"].update(hidden_size=True), "hidden_size"),
        (lambda content: content["header"].update(taps=[0, -2]), "taps"),
        (lambda content: content.pop("header"), "header"),
        (lambda content: content["header"].update(more=1), "more"),
    ],
)
def test_what_cannot_be_true_is_named(tmp_path: Path, change: Any, says: str) -> None:
    content = _written(tmp_path)
    change(content)
    (tmp_path / "manifest.json").write_text(json.dumps(sealed(content)))
    for use in (HDF5Format().header, lambda path: HDF5Format().open(path, None), HDF5Format().verify):
        with pytest.raises(CacheError, match="manifest is damaged") as caught:
            use(tmp_path)
        assert says in str(caught.value)


def test_ids_and_lengths_take_few_bytes_a_sample(tmp_path: Path) -> None:
    names = [f"conversation {number:06d}" for number in range(5000)]
    shard = evolve(SHARDS[0], ids=names, lengths=[60] * 5000)
    evolve(WHOLE, shards=(shard,)).save(tmp_path)
    found = manifests.load(tmp_path, format="hdf5")
    assert found is not None
    ids = found.shards[0].ids
    assert ids == names
    assert list(ids) == names
    assert (ids[7], ids[3:5]) == (names[7], names[3:5])
    assert ids.take(np.array([5, 2])) == [names[5], names[2]]
    # 19 of text, 4 for its place, 4 for the length.
    assert len(pickle.dumps(found)) < 30 * 5000


@pytest.mark.parametrize("version", [1, 3])
def test_a_cache_of_another_version_is_told(tmp_path: Path, version: int) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({**_written(tmp_path), "version": version}))
    for use in (HDF5Format().header, lambda path: HDF5Format().open(path, None), HDF5Format().verify):
        with pytest.raises(CacheError, match="a version of DeepSpec whose caches") as caught:
            use(tmp_path)
        assert f"hdf5 version {version}" in str(caught.value)
        assert "--force cache" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\udcff"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CacheError, match="manifest is damaged"):
        HDF5Format().header(tmp_path)


def test_an_unknown_storage_type_is_refused(tmp_path: Path) -> None:
    content = _written(tmp_path)
    content["header"]["dtype"] = "int4"
    (tmp_path / "manifest.json").write_text(json.dumps(sealed(content)))
    with pytest.raises(CacheError, match=r"(?s)unknown type.*int4.*bfloat16"):
        HDF5Format().open(tmp_path, None)
