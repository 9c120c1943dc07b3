"""Digests of weight files: what changes them, and what is remembered of them."""

import json
import os
import time
from pathlib import Path

import pytest

from deepspec_core import digests
from deepspec_core.digests import digests_of, memory_file

SIZE = 300_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deepspec" / "digests.json"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old enough to be remembered at once."""
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -60.0)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(SIZE))
    return path


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is read from now on."""
    seen: list[Path] = []
    read = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda path, progress: (seen.append(path), read(path, progress))[1])
    return seen


@pytest.mark.parametrize("place", [0, 70_000, SIZE // 2, SIZE - 70_000, SIZE - 1])
def test_a_byte_anywhere_changes_the_digest(weights: Path, place: int, settled: None) -> None:
    before = digests_of([weights])
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.seek(place)
        file.write(b"\1")
    # The size is the same, and the time of modification is set back: the time of change gives it away.
    time.sleep(0.02)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_mtime_ns == stat.st_mtime_ns
    assert digests_of([weights]) != before


def test_a_file_is_read_once(weights: Path, settled: None, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    seen = reads(monkeypatch)
    first = digests_of([weights])
    assert seen == [weights]
    assert memory_file() == cache
    assert digests_of([weights]) == first
    assert seen == [weights]
    # A link is the file it points to.
    link = weights.with_name("link.safetensors")
    link.symlink_to(weights)
    assert digests_of([link]) == first
    assert seen == [weights]


def test_another_file_in_its_place_is_read(weights: Path, settled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    digests_of([weights])
    other = weights.with_name("other")
    other.write_bytes(bytes(SIZE))
    other.replace(weights)
    seen = reads(monkeypatch)
    digests_of([weights])
    assert seen == [weights]


def test_a_file_that_may_change_under_the_same_time_is_not_remembered(
    weights: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    seen = reads(monkeypatch)
    digests_of([weights])
    digests_of([weights])
    assert seen == [weights, weights]
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    weights: Path, settled: None, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    states = iter([[1], [2]])
    monkeypatch.setattr(digests, "_state", lambda path: next(states))
    digests_of([weights])
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"PATH": 3}', '{"PATH": [1, "x"]}', "\udcff"])
def test_a_damaged_memory_counts_as_empty(weights: Path, settled: None, cache: Path, content: str) -> None:
    expected = digests_of([weights])
    cache.write_bytes(content.replace("PATH", str(weights)).encode(errors="surrogateescape"))
    assert digests_of([weights]) == expected
    assert str(weights) in json.loads(cache.read_text())


def test_two_processes_keep_each_other_s(weights: Path, settled: None, cache: Path) -> None:
    other = weights.with_name("other.safetensors")
    other.write_bytes(b"other")
    digests_of([weights])
    digests_of([other])
    assert set(json.loads(cache.read_text())) == {str(weights), str(other)}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_the_oldest_fall_out(weights: Path, settled: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_REMEMBERED", 2)
    paths = [weights.with_name(f"{number}.safetensors") for number in range(4)]
    for path in paths:
        path.write_bytes(path.name.encode())
        digests_of([path])
    assert list(json.loads(cache.read_text())) == [str(path) for path in paths[2:]]


def test_a_memory_that_cannot_be_written_is_done_without(
    weights: Path, settled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digests_of([weights])
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert digests_of([weights]) == expected


def test_the_memory_is_never_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A relative path would be relative to wherever the process was started.
    for unusable in ("relative/cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert memory_file() == tmp_path / ".cache" / "deepspec" / "digests.json"
