"""Two processes on what can be shared: one of them works, the other is refused in words, and nothing is mixed."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepspec_core.cli.main import main
from deepspec_core.locks import lock

COMMAND = [sys.executable, "-m", "deepspec_core"]
ONE_THREAD = ["--set", "run.threads=1"]


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def _together(*commands: list[str]) -> list[tuple[int, str]]:
    """Exit code and messages of processes that run side by side."""
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    return [(process.wait(), process.stdout.read() if process.stdout else "") for process in processes]


def _one_of(results: list[tuple[int, str]], refusal: str) -> None:
    """One did it. The other was refused, or came late enough to find it done."""
    codes = sorted(code for code, _ in results)
    assert codes in ([0, 2], [0, 0]), results
    assert not any("Traceback" in text for _, text in results)
    if codes == [0, 2]:
        assert refusal in next(text for code, text in results if code == 2)
    else:
        assert any("already complete" in text for _, text in results)


def _texts(folder: Path) -> bytes:
    return (folder / "regenerate" / "conversations.jsonl").read_bytes()


@pytest.mark.slow
def test_one_run_folder(run_file: Path, finished: Path) -> None:
    command = [*COMMAND, "run", str(run_file), "--smoke", *ONE_THREAD]
    _one_of(_together(command, command), "Another process is working on this run")
    assert _texts(_folder(run_file)) == _texts(_folder(finished))
    assert main(["run", str(run_file), "--smoke", *ONE_THREAD]) == 0
    assert (_folder(run_file) / "metrics.json").exists()


@pytest.mark.slow
def test_one_cache_of_two_runs(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.toml"
    other.write_text(run_file.read_text().replace("quickstart-dflash", "another"))
    shared = ["--set", f"cache.path={json.dumps(str(tmp_path / 'cache'))}", "--set", 'run.stages=["cache", "train"]']
    shared += ["--set", "data.min_supervised_tokens=1"]
    data = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"The number is {n}."}]}
        for n in range(40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared += ["--set", f"data.sources=[{{path={json.dumps(str(data))}}}]"]
    commands = [[*COMMAND, "run", str(path), "--smoke", *ONE_THREAD, *shared] for path in (run_file, other)]
    # It is writing the cache, or has written it since this run looked.
    _one_of(_together(*commands), "Another process")
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0
    for path in (run_file, other):
        assert main(["run", str(path), "--smoke", *ONE_THREAD, *shared]) == 0
    assert "samples" in capsys.readouterr().out


@pytest.mark.slow
def test_one_folder_of_an_evaluation(finished: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "task.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"Say {number}"]}) + "\n" for number in range(6)))
    command = [*COMMAND, "evaluate", "--target", "builtin:tiny-qwen3", "--draft", str(_folder(finished) / "draft")]
    command += ["--task", str(prompts), "--max-new-tokens", "20", "--out", str(tmp_path / "out")]
    _one_of(_together(command, command), "Another process is working on this run")
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [result["samples"] for result in report["results"]] == [6]


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: int
) -> None:
    def without(_handle: int, _operation: int) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("fcntl.flock", without)
    with lock(tmp_path, problem="taken", fix=""):
        assert f"the file system of {tmp_path} has no locks" in caplog.text
