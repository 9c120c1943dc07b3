"""A disk that fills while a stage writes: one error that says where, and a rerun with room goes on.

Files that may not grow beyond a limit take the place of a full disk: both refuse the same writes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepspec_core.cli.main import main

_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from deepspec_core.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
ONE_THREAD = ("--set", "run.threads=1")


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def _results(folder: Path) -> tuple[bytes, list[int]]:
    report = json.loads((folder / "metrics.json").read_text())
    return (folder / "regenerate" / "conversations.jsonl").read_bytes(), [one["rounds"] for one in report["results"]]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "limit"), [("regenerate", 9000), ("train", 200_000), ("evaluate", 9000)])
def test_a_stage_without_room_ends_in_one_error_and_goes_on_with_room(
    finished: Path, finished_copy: Path, stage: str, limit: int
) -> None:
    folder = _folder(finished_copy)
    arguments = ["run", str(finished_copy), "--smoke", *ONE_THREAD]
    command = [sys.executable, "-c", _LIMITED, str(limit), *arguments, "--stages", stage, "--force", stage]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "There is no room to write" in done.stderr
    assert str(folder) in done.stderr
    assert "File too large" in done.stderr
    assert not json.loads((folder / stage / "stage.json").read_text())["complete"]
    assert main(arguments) == 0
    assert _results(folder) == _results(_folder(finished))


@pytest.mark.slow
def test_no_room_for_the_first_small_files_is_one_error_too(run_file: Path) -> None:
    command = [sys.executable, "-c", _LIMITED, "700", "run", str(run_file), "--smoke", *ONE_THREAD]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "There is no room to write" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("limit", [6000, 300_000])
def test_no_room_for_an_export_is_one_error_too(drafts: dict[str, Path], tmp_path: Path, limit: int) -> None:
    pytest.importorskip("gguf")
    arguments = ["export", str(drafts["dspark"]), "--to", "gguf", "--target", "builtin:tiny-qwen3"]
    command = [sys.executable, "-c", _LIMITED, str(limit), *arguments, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "There is no room to write" in done.stderr
    assert list(tmp_path.iterdir()) == []
