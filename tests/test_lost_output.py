"""Standard output that is full or closed: one message or none, no traceback, and an exit code other than 0."""

import subprocess
import sys
from pathlib import Path

import pytest

from deepspec_core.cli.output import CLOSED

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
COMMAND = [sys.executable, "-m", "deepspec_core"]


def _commands(run_file: Path) -> dict[str, list[str]]:
    folder = run_file.parent / "runs" / "quickstart-dflash-smoke"
    return {
        "plugins": ["plugins"],
        "keys": ["config", "keys"],
        "show": ["config", "show", str(run_file)],
        "check": ["config", "check", str(run_file)],
        "data": ["data", "show", str(run_file)],
        "report": ["report", str(folder)],
        "estimate": ["estimate", str(run_file)],
        "checkpoint": ["checkpoint", "show", str(folder / "draft")],
        "cache": ["cache", "verify", str(folder / "cache")],
        "dry run": ["run", str(run_file), "--smoke", "--dry-run"],
        "run": ["run", str(run_file), "--smoke"],
        "generate": ["generate", "--target", "builtin:tiny-qwen3", "--max-new-tokens", "4", "Hello"],
        "help": ["--help"],
    }


@pytest.mark.parametrize("name", ["keys", "report"])
def test_a_full_output_is_one_message(finished: Path, name: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *_commands(finished)[name]], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2, done.stderr
    assert "The output cannot be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_no_command_has_a_traceback_for_a_lost_output(finished: Path) -> None:
    for name, arguments in _commands(finished).items():
        with open("/dev/full", "w") as full:
            done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2, (name, done.stderr)
        assert "The output cannot be written" in done.stderr, (name, done.stderr)
        assert "Traceback" not in done.stderr, (name, done.stderr)
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait() == CLOSED, (name, errors)
        assert "Traceback" not in errors, (name, errors)
        assert "rror" not in errors, (name, errors)


def test_a_closed_pipe_ends_a_command_quietly(finished: Path) -> None:
    command = [*COMMAND, *_commands(finished)["keys"]]
    done = subprocess.run(f"{' '.join(command)} | head -1", shell=True, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


@pytest.mark.slow
def test_full_messages_stop_nothing(finished: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [*COMMAND, *_commands(finished)["data"]]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == 0
    assert "Hello" in done.stdout or len(done.stdout) > 100


@pytest.mark.parametrize(("name", "closed"), [("checkpoint", ">&-"), ("show", "<&- 2>&-")])
def test_closed_streams_stop_nothing(finished: Path, name: str, closed: str) -> None:
    """A file that is opened later would otherwise take the place of a closed stream, and receive what goes there."""
    command = ["sh", "-c", f'"$0" "$@" {closed}', *COMMAND, *_commands(finished)[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert ("dflash" in done.stdout) == (">&-" not in closed.split())
