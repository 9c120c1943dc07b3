"""`deepspec status`: living, dead, silent and finished runs are told apart, from files alone and without PyTorch."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deepspec_core.cli.status import status
from deepspec_core.errors import StageError
from deepspec_core.pipeline import heartbeat
from deepspec_core.pipeline.fingerprint import StageRecord
from deepspec_core.pipeline.heartbeat import STATUS, beating, enter
from deepspec_core.pipeline.run_status import SILENT_SECONDS, RunStatus, status_of
from deepspec_core.progress import Progress

CONFIG = '[run]\nname = "tiny"\nstages = ["cache", "train", "evaluate"]\n'
# A run of its own: it says when it is in the middle of a stage, and then waits to be killed.
PROCESS = """
import sys, time
from pathlib import Path
from deepspec_core.pipeline.heartbeat import beating, enter
with beating(Path(sys.argv[1]), ["train"]):
    enter("train")
    print("begun", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    record(tmp_path, "cache", complete=True)
    return tmp_path


def record(folder: Path, stage: str, *, complete: bool) -> None:
    StageRecord(stage=stage, keys={}, complete=complete, seconds=62.0, plugins={}, summary={}).write(folder / stage)


def shown(folder: Path) -> str:
    result = CliRunner().invoke(status, [str(folder)])
    assert result.exit_code == 0, result.output
    return result.output


def change(folder: Path, **values: Any) -> RunStatus:
    path = folder / STATUS
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return status_of(folder)


def test_a_running_stage_is_shown_with_its_progress_figures_and_warnings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    (folder / "train").mkdir()
    line = {"step": 40, "loss": 2.5, "slowest_rank": 1, "slowest_rank_seconds": 0.5, "fastest_rank_seconds": 0.25}
    (folder / "train" / "metrics.jsonl").write_text(json.dumps(line) + "\nhalf a li")
    with beating(folder, ["train", "evaluate"]):
        enter("train")
        assert "no progress to show yet" in shown(folder)
        logging.getLogger("deepspec").warning("the disk is nearly full")
        with Progress(1000, "train", "steps", done=20) as progress:
            progress.advance(20, loss=2.5, memory="3 GB")
            until = time.monotonic() + 20
            while status_of(folder).progress is None and time.monotonic() < until:
                time.sleep(0.01)
            text, found = shown(folder), status_of(folder)
    assert (found.state, found.stage, found.warnings_count) == ("running", "train", 1)
    assert {name: state for name, (state, _) in found.stages.items()} == {
        "cache": "complete", "train": "running", "evaluate": "not begun",
    }  # fmt: skip
    assert "cache     complete, 1:02" in text
    assert "train: 40 of 1,000 steps" in text
    assert "loss 2.5, 3 GB" in text
    assert "slowest rank: 1, 0.5 s a step, the fastest 0.25" in text
    assert "the disk is nearly full" in text
    assert found.seconds_left is not None
    assert json.loads(json.dumps(found.as_json()))["slowest"] == {"rank": 1, "seconds": 0.5, "fastest_seconds": 0.25}


def test_how_a_run_ended_is_kept(folder: Path) -> None:
    with beating(folder, ["train"]):
        enter("train")
    assert status_of(folder).state == "finished"
    with pytest.raises(StageError), beating(folder, ["train"]):
        raise StageError("There is no room to write")
    assert "failed: There is no room to write" in shown(folder)
    with pytest.raises(KeyboardInterrupt), beating(folder, ["train"]):
        raise KeyboardInterrupt
    record(folder, "train", complete=False)
    assert status_of(folder).state == "stopped"
    assert "train     interrupted, 1:02" in shown(folder)
    with beating(folder, []):  # nothing is to be done
        assert status_of(folder).state == "stopped"


def test_a_killed_run_is_dead_at_once_and_a_stopped_one_is_silent(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PROCESS, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        assert status_of(folder).state == "running"
        old = time.time() - SILENT_SECONDS - 1
        os.kill(process.pid, signal.SIGSTOP)
        assert change(folder, beat=old).state == "silent"
        process.kill()
        process.wait()
    found = status_of(folder)
    assert (found.state, found.stage, found.progress) == ("dead", "train", None)
    assert f"its process {process.pid} is gone" in found.said


def test_a_number_that_another_process_has_by_now_is_not_taken_for_the_run(folder: Path) -> None:
    with beating(folder, ["train"]):
        own = json.loads((folder / STATUS).read_text())["process"]
        assert change(folder, process={**own, "started": "1"}).state == "dead"


def test_on_another_machine_the_age_of_the_last_sign_tells(folder: Path) -> None:
    with beating(folder, ["train"]):
        pass
    elsewhere = {"host": "node7", "boot": "b", "numbers": "n", "pid": 1, "started": "1"}
    assert change(folder, state="running", process=elsewhere, beat=time.time() - 5).state == "running"
    found = change(folder, beat=time.time() - SILENT_SECONDS - 1)
    assert found.state == "silent"
    assert "node7" in found.said


def test_damaged_files_are_remarks_and_a_folder_without_a_run_is_an_error(folder: Path, tmp_path: Path) -> None:
    (folder / STATUS).write_text('{"version": 1, "state": "running"}')
    (folder / "metrics.json").write_text("[]")
    (folder / "evaluate").mkdir()
    (folder / "evaluate" / "stage.json").write_text("{")
    found = status_of(folder)
    assert (found.state, len(found.remarks)) == ("begun", 3)
    (folder / STATUS).write_text("no JSON")
    assert "status.json cannot be read" in shown(folder)
    with pytest.raises(StageError, match="There is no run in this folder"):
        status_of(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"warnings": {"count": 1, "newest": [{"time": "abc", "text": "x"}]}}, "warnings.newest"),
        ({"warnings": {"count": 1, "newest": [{"time": 1e300, "text": "x"}]}}, "warnings.newest"),
        ({"warnings": {"count": 1, "newest": 5}}, "warnings.newest"),
        ({"process": {"pid": 10**30}}, "process.pid"),
        ({"beat": 10**400}, "beat"),
        ({"progress": {"what": "train", "done": 1, "total": 2, "unit": "steps", "rate": 10**400, "seconds_left": None,
                       "figures": {"loss": 10**400}, "done_by_worker": [10**400, 1]}}, "rate, figures, done_by_worker"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_are_a_remark(folder: Path, values: dict[str, Any], named: str) -> None:
    with beating(folder, ["train"]):
        enter("train")
        own = json.loads((folder / STATUS).read_text())["process"]
    found = change(folder, **{"state": "running", **values, "process": own | values.get("process", {})})
    assert found.remarks == [f"status.json cannot be used: {named}"]
    assert found.remarks[0] in shown(folder)
    assert CliRunner().invoke(status, [str(folder), "--json"]).exit_code == 0


def test_text_of_files_does_not_command_the_terminal(folder: Path) -> None:
    with beating(folder, ["train"]):
        pass
    warning = {"time": 1.0, "text": "two\nlines \x9b2J"}
    change(folder, state="failed", error="\ud800 \x1b[2J at 3 °", warnings={"count": 1, "newest": [warning]})
    text = shown(folder)
    assert "failed: \ufffd \ufffd[2J at 3 °" in text
    assert "two lines \ufffd2J" in text


def test_the_command_imports_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys; from deepspec_core.cli.main import main; code = main(['status', sys.argv[1]]);"
        "print([name for name in ('torch', 'transformers', 'numpy', 'pyarrow') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
