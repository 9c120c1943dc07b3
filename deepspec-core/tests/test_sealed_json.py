"""Files that two write at once: one of them stays, whole, and neither writer fails."""

import os
import threading
from pathlib import Path

import pytest

from deepspec_core.errors import DataError
from deepspec_core.evaluation.sealed_json import read_sealed, write_sealed


def test_a_file_that_two_write_at_once_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have written before either puts its file in place, as two `deepspec calibrate` of one run can."""
    path, both = tmp_path / "one.json", threading.Barrier(2, timeout=60)
    replace = os.replace

    def late(source: Path, target: Path) -> None:
        both.wait()
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    errors: list[Exception] = []

    def write(size: int) -> None:
        try:
            write_sealed(path, {"numbers": [size] * size}, form="numbers", version=1)
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(size,)) for size in (5, 5000)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert errors == []
    found = read_sealed(path, form="numbers", version=1, what="the numbers", kind=DataError, fix="")["numbers"]
    assert found in ([5] * 5, [5000] * 5000)
    assert [one.name for one in tmp_path.iterdir()] == ["one.json"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_sealed(tmp_path / "one.json", {"number": float("nan")}, form="numbers", version=1)
    (tmp_path / "two.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_sealed(tmp_path / "two.json", {}, form="numbers", version=1)
    assert [one.name for one in tmp_path.iterdir()] == ["two.json"]
