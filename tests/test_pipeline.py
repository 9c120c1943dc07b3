"""The whole way from a run file to a report, small: what a run leaves behind, and what a rerun does about it."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepspec_core.cli.main import main

# As the finished run was made, so that texts, which are compared exactly, are sampled from the same sums.
ONE_THREAD = ("--set", "run.threads=1")
STAGES = ("regenerate", "cache", "train", "evaluate")


def _folder(path: Path) -> Path:
    return path.parent / "runs" / "quickstart-dflash-smoke"


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (".lock", "config.toml")
    }


def test_a_run_leaves_checkpoint_config_metrics_and_report(finished: Path) -> None:
    folder = _folder(finished)
    assert (folder / "draft" / "model.safetensors").exists()
    assert json.loads((folder / "draft" / "config.json").read_text())["architectures"] == ["Qwen3DSparkModel"]
    report = json.loads((folder / "metrics.json").read_text())
    assert [result["temperature"] for result in report["results"]] == [0.0, 1.0]
    for result in report["results"]:
        assert result["samples"] == 4
        assert 1 <= result["acceptance_length"] <= 8
        assert result["plain"]["tokens"] > 0
    assert report["results"][0]["mismatches"] == []
    assert "accepted length" in (folder / "report.md").read_text()
    assert main(["config", "check", str(folder / "config.toml")]) == 0


def test_rerunning_does_nothing_and_says_so(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _contents(_folder(finished_copy))
    assert main(["run", str(finished_copy), "--smoke"]) == 0
    assert _contents(_folder(finished_copy)) == before
    output = capsys.readouterr().out
    assert "nothing to do: every stage is complete" in output
    assert all(f"{stage}: already complete" in output for stage in STAGES)


def test_a_changed_setting_is_refused_by_name_and_nothing_is_touched(
    finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(_folder(finished_copy))
    assert main(["run", str(finished_copy), "--smoke", "--set", "train.lr=1e-3"]) == 2
    message = capsys.readouterr().err
    assert "`train.lr` changed" in message
    assert "0.004" in message
    assert "0.001" in message
    assert "--force train" in message
    assert _contents(_folder(finished_copy)) == before


def test_settings_a_stage_does_not_read_may_change(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "train.log_every=7", "--set", "cache.batch_size=3", "--set", "regenerate.batch_size=5"]
    assert main(["run", str(finished_copy), "--smoke", *changes]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_force_discards_a_stage_and_what_builds_on_it(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(finished_copy)
    kept = (folder / "cache" / "stage.json").read_bytes()
    changed = ["--set", "train.lr=1e-3", "--set", "evaluate.temperature=[0.0]", "--force", "train"]
    assert main(["run", str(finished_copy), "--smoke", *changed]) == 0
    output = capsys.readouterr().out
    assert "cache: already complete" in output
    assert "train: starting" in output
    assert "evaluate: starting" in output
    assert (folder / "cache" / "stage.json").read_bytes() == kept


def test_a_dry_run_writes_nothing(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(run_file), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "at most 2,500 conversations" in output
    assert "bytes a token" in output
    assert [entry.name for entry in run_file.parent.iterdir()] == ["train.toml"]


def test_a_stage_without_its_inputs_says_what_to_run(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(run_file), "--smoke", "--stages", "train"]) == 2
    assert "--stages regenerate,cache,train" in capsys.readouterr().err
    # A gap is seen before the first stage runs.
    for flags in ([], ["--dry-run"]):
        assert main(["run", str(run_file), "--smoke", "--stages", "regenerate,evaluate", *flags]) == 2
        seen = capsys.readouterr()
        assert "needs the results of `cache`, which never ran, and of `train`, which never ran" in seen.err
        assert "--stages regenerate,cache,train,evaluate" in seen.err
        assert "starting" not in seen.out


def test_a_new_draft_is_not_shown_with_the_old_one_s_figures(
    finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(finished_copy), "--smoke", *ONE_THREAD, "--force", "train", "--stages", "train"]
    assert main([*command, "--set", "train.lr=1e-2"]) == 0
    assert "accepted length" not in capsys.readouterr().out
    assert not (_folder(finished_copy) / "metrics.json").exists()
    assert not (_folder(finished_copy) / "report.md").exists()


def test_an_unknown_stage_is_refused_with_the_nearest(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(finished_copy), "--smoke", "--stages", "trian"]) == 2
    assert "Did you mean `train`?" in capsys.readouterr().err


def test_two_processes_do_not_share_a_run(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(_folder(finished_copy) / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert main(["run", str(finished_copy), "--smoke"]) == 2
        assert "Another process is working on this run" in capsys.readouterr().err
    finally:
        holder.kill()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _seal(folder: Path) -> dict[str, object]:
    """What must come out the same, killed or not: texts and rounds; times and floating logs aside."""
    report = json.loads((folder / "metrics.json").read_text())
    return {
        "conversations": _digest(folder / "regenerate" / "conversations.jsonl"),
        "rounds": [
            (result["rounds"], result["acceptance_length"], result["output_tokens"]) for result in report["results"]
        ],
    }


def _check_weights(found: Path, expected: Path) -> None:
    """Equal up to rounding: sums formed in other memory or in another order differ in their last bits.

    Adam divides a gradient by its own size, so where one weight's gradient is nearly zero its last bits decide a whole
    step. Whole tensors are compared for that reason. Two workers are apart by up to 7e-6 of a tensor's norm; a batch of
    15 samples in place of 16 moves every tensor by 2e-3 of it or more, and matrices by 0.1.
    """
    mine, theirs = (load_file(folder / "draft" / "model.safetensors") for folder in (found, expected))
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.linalg.vector_norm(mine[name] - weight) <= 1e-4 * torch.linalg.vector_norm(weight), name


@pytest.mark.slow
def test_several_workers_end_where_one_does(finished: Path, run_file: Path) -> None:
    command = [sys.executable, "-m", "deepspec_core", "run", str(run_file), "--smoke", "--workers", "2", *ONE_THREAD]
    assert subprocess.run(command, check=False).returncode == 0
    _check_weights(_folder(run_file), _folder(finished))
    seen = _seal(_folder(run_file))
    assert seen["conversations"] == _seal(_folder(finished))["conversations"]


@pytest.mark.slow
def test_killed_in_every_stage_and_rerun_it_ends_as_if_never_killed(finished: Path, run_file: Path) -> None:
    folder = _folder(run_file)
    command = [sys.executable, "-c", "import sys; from deepspec_core.cli.main import main; sys.exit(main())"]
    command += ["run", str(run_file), "--smoke", "--set", "train.checkpoint_every=2", *ONE_THREAD]
    marks = {
        "regenerate": folder / "regenerate" / "conversations.jsonl.partial",
        "cache": folder / "cache" / "manifest.json",
        "train": folder / "train" / "checkpoints",
        "evaluate": folder / "evaluate" / "held-out-t0.jsonl",
    }
    killed = []
    for stage, mark in marks.items():
        process = subprocess.Popen(command)
        while process.poll() is None:
            record = folder / stage / "stage.json"
            if mark.exists() and record.exists() and not json.loads(record.read_text())["complete"]:
                # A moment into the stage's work, not at its very start.
                time.sleep(0.3)
                process.send_signal(signal.SIGKILL)
                killed.append(stage)
                break
            time.sleep(0.005)
        process.wait()
    assert "train" in killed, "the machine outran the test: nothing was killed in training"
    assert subprocess.run(command, check=False).returncode == 0
    assert _seal(folder) == _seal(_folder(finished))
    _check_weights(folder, _folder(finished))
