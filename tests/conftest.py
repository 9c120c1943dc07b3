"""A finished small run of the quickstart, made once for all tests that look at one."""

import shutil
from pathlib import Path

import pytest

from deepspec_core.cli.main import main

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "train.toml"


def write_run_file(folder: Path) -> Path:
    """The quickstart's file in a folder of its own, its results beside it."""
    path = folder / "train.toml"
    path.write_text(QUICKSTART.read_text().replace("../../runs/", "runs/"))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a finished smoke run; tests that change anything work on `finished_copy`."""
    path = write_run_file(tmp_path_factory.mktemp("finished"))
    assert main(["run", str(path), "--smoke"]) == 0
    return path


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """The same in a folder a test may change."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / finished.name


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """The quickstart's run file, nothing run yet."""
    return write_run_file(tmp_path)
