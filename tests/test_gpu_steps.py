"""Scripts for a GPU that is at hand for minutes: a step that has passed is kept, any other is run again."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks" / "gpu"))
from steps import Options, Step, run


def options(folder: Path, minutes: float = 1.0) -> Options:
    return Options(output=folder, tiny=False, minutes=minutes, device="cpu")


def writes(folder: Path, code: int = 0, name: str = "one", limit: float = 60.0) -> Step:
    """Adds a line to a file, and leaves with this code."""
    program = f"open({str(folder / 'ran')!r}, 'a').write('x'); raise SystemExit({code})"
    return Step(name=name, arguments=["-c", program], limit=limit, figures=lambda: {"ran": times(folder)})


def times(folder: Path) -> int:
    path = folder / "ran"
    return len(path.read_text()) if path.exists() else 0


def test_what_has_passed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([writes(tmp_path)], options(tmp_path)) == 0
    assert run([writes(tmp_path)], options(tmp_path)) == 0
    assert times(tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("| one | passed |")


def test_what_has_failed_is_run_again_and_so_is_another_command(tmp_path: Path) -> None:
    assert run([writes(tmp_path, code=3)], options(tmp_path)) == 1
    assert "exit code 3" in (tmp_path / "one.json").read_text()
    assert run([writes(tmp_path, code=0)], options(tmp_path)) == 0
    assert times(tmp_path) == 2


def test_time_is_kept(tmp_path: Path) -> None:
    slow = Step(name="slow", arguments=["-c", "import time; time.sleep(60)"], limit=1.0)
    assert run([slow, writes(tmp_path)], options(tmp_path)) == 1
    assert "ended at its limit" in (tmp_path / "slow.json").read_text()
    assert run([writes(tmp_path, name="late")], options(tmp_path, minutes=0.0)) == 1
    assert times(tmp_path) == 1
