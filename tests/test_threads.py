"""How many threads a run's stages compute with, and that waiting threads give up their core."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.pipeline import threads
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import load_plugins

STAGES = ("regenerate", "cache", "train", "evaluate")


def _run(path: Path, *overrides: str) -> Run:
    plugins = load_plugins()
    return Run(file=load_run_file(path, overrides=overrides, plugins=plugins), path=path, plugins=plugins)


def test_small_steps_get_one_thread_and_large_ones_all(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available", lambda: 8)
    chosen = threads.choose(_run(run_file), STAGES)
    # Decoding a 2.6 M target is small work; captured and trained sequences are long.
    assert chosen == {"regenerate": 1, "cache": 8, "train": 8, "evaluate": 1}
    larger = threads.choose(_run(run_file, "regenerate.batch_size=100"), STAGES)
    assert larger["regenerate"] == 4


def test_the_same_file_chooses_the_same_threads_after_a_stage_changed_them(run_file: Path) -> None:
    run = _run(run_file)
    first = threads.choose(run, STAGES)
    before = torch.get_num_threads()
    with threads.using(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    assert threads.choose(run, STAGES) == first


def test_the_run_file_decides_where_it_speaks(run_file: Path) -> None:
    chosen = threads.choose(_run(run_file, "run.threads=3"), STAGES)
    assert chosen == dict.fromkeys(STAGES, 3)
    assert threads.in_words(chosen, given=True) == "threads: 3 (as run.threads says)"


def test_a_number_from_the_environment_is_named_and_not_shared_among_workers(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "available", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads.choose(_run(run_file), ["train"], processes=2) == {"train": 2}
    assert "OMP_NUM_THREADS" not in threads.in_words({"train": 2}, given=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.choose(_run(run_file), ["train"], processes=2) == {"train": 4}
    assert "at most the 4 of OMP_NUM_THREADS" in threads.in_words({"train": 4}, given=False)


def test_a_container_s_quota_bounds_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    quota = tmp_path / "cpu.max"
    for text, expected in (("150000 100000\n", 2), ("max 100000\n", 64), ("50000 100000\n", 1)):
        quota.write_text(text)
        assert threads.available(quota) == expected
    assert threads.available(tmp_path / "missing") == 64


def test_the_first_lines_of_a_run_say_what_was_chosen(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--stages", "evaluate", "--set", "evaluate.temperature=[0.0]", "--set", "evaluate.plain=false"]
    assert main(["run", str(finished_copy), "--smoke", "--force", "evaluate", *small]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("discarded")]
    assert lines[0].startswith("threads: 1")


def test_waiting_threads_sleep_unless_the_user_says_otherwise() -> None:
    for given in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        kept = dict(given)
        threads.let_waiting_threads_sleep(kept)
        assert kept == given
    empty: dict[str, str] = {}
    threads.let_waiting_threads_sleep(empty)
    assert empty == {"GOMP_SPINCOUNT": threads.SPIN_COUNT}


def test_the_command_line_says_so_before_pytorch_is_loaded() -> None:
    code = (
        "import os, sys; from deepspec_core.cli.main import main; main(['--version']); "
        "assert 'torch' not in sys.modules; print(os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == threads.SPIN_COUNT
