"""The exchange folder: whose files are whose on copies and other machines, and files that cannot be removed."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from deepspec_core.features.served.exchange import OWNER, Exchange, Ownership, owner_of


def exchange(folder: Path, owner: str = "a" * 16) -> Exchange:
    return Exchange(folder=folder, ownership=Ownership(owner=owner), most=10**6)


def test_a_run_keeps_its_owner(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert owner_of(run) == owner_of(run)
    (run / "metrics.jsonl").touch()
    assert owner_of(run) == owner_of(tmp_path / "." / "run")


def test_a_copy_at_the_same_path_is_another_owner(tmp_path: Path) -> None:
    """As on another machine: the same path and the same files, on another disk."""
    run, there = tmp_path / "run", tmp_path / "there"
    before = owner_of(run)
    shutil.copytree(run, there)
    assert (there / OWNER).read_bytes() == (run / OWNER).read_bytes()
    run.rename(tmp_path / "kept")  # so that the copy cannot have its inodes
    there.rename(run)
    assert owner_of(run) != before


def test_whoever_may_not_write_leaves_no_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert len(owner_of(run, may_write=False)) == 16
    assert not run.exists()
    assert owner_of(run) == owner_of(run, may_write=False)


def test_only_the_sessions_files(tmp_path: Path) -> None:
    """The check before the first stage removes its own; another process of the run may be at work."""
    trial, other = exchange(tmp_path), exchange(tmp_path)
    for one in (trial, other):
        (tmp_path / f"{one.ownership.beginning}000000001.safetensors").write_bytes(b"half")
    assert trial.clear(session=True) == (1, 4)
    assert [path.name for path in tmp_path.iterdir()] == [f"{other.ownership.beginning}000000001.safetensors"]
    assert trial.clear() == (1, 4), "the next start of the run removes what a kill left"


def test_what_cannot_be_removed_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a folder with the sticky bit: another user's file stays, and the rest is removed."""
    own = exchange(tmp_path)
    theirs, ours = (tmp_path / f"{own.ownership.beginning}00000000{number}.safetensors" for number in (1, 2))
    for path in (theirs, ours):
        path.write_bytes(b"file")
    unlink = os.unlink

    def sticky(path: str) -> None:
        if path == str(theirs):
            raise PermissionError(1, "Operation not permitted", path)
        unlink(path)

    monkeypatch.setattr("os.unlink", sticky)
    with caplog.at_level(logging.WARNING, logger="deepspec"):
        assert own.clear() == (1, 4)
        assert own.clear() == (0, 0)
    (told,) = [record.getMessage() for record in caplog.records]
    assert theirs.name in told
    assert "not permitted" in told
    assert "umask" in told
    monkeypatch.undo()
    assert own.clear() == (1, 4)


def test_a_folder_that_is_gone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="deepspec"):
        assert exchange(tmp_path / "gone").clear() == (0, 0)
    assert "No such file" in caplog.text
