"""The folder of a run file, from a run's folder: where it says, and where it does not."""

from pathlib import Path

import pytest

from deepspec_core.config.run_file_place import run_file_folder


@pytest.mark.parametrize("output", ["runs/mine", "./runs/mine", "runs/other/../mine"])
def test_output_goes_down_from_the_run_file(tmp_path: Path, output: str) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    assert run_file_folder(folder, output) == tmp_path.resolve()


def test_the_run_files_folder_itself(tmp_path: Path) -> None:
    assert run_file_folder(tmp_path, ".") == tmp_path.resolve()


@pytest.mark.parametrize("output", ["../mine", "runs/renamed", "/runs/mine", "{folder}"])
def test_what_does_not_say(tmp_path: Path, output: str) -> None:
    """An absolute output says nothing of the run file, the folder's own path neither."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    assert run_file_folder(folder, output.format(folder=folder)) is None
