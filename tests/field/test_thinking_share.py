"""A draft trained in one mode collapses in the other: each prompt is asked in one of them, and both are reported."""

import json
from pathlib import Path
from typing import Any

import pytest

import deepspec_core as ds
from deepspec_core.cli.main import main
from deepspec_core.data.thinking import modes, thinks

MODES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_the_id_alone_decides() -> None:
    names = [f"q{number}" for number in range(4000)]
    share = [thinks(0.25, name) for name in names]
    assert 0.22 < sum(share) / len(share) < 0.28
    assert share == [thinks(0.25, name) for name in names]
    assert all(thinks(0.5, name) for name, thought in zip(names, share, strict=True) if thought)
    assert {thinks(True, name) for name in names} == {True}
    assert (modes(0.25), modes(True), modes(False)) == ((False, True), (True,), (False,))


@pytest.mark.slow
def test_answers_and_evaluation_in_both_modes(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_file.parent / "modes.jinja").write_text(MODES)
    command = ["run", str(run_file), "--smoke", "--set", 'target.chat_template="modes.jinja"', "--set", "run.threads=1"]
    assert main([*command, "--set", "regenerate.thinking=0.5", "--set", "evaluate.temperature=0"]) == 0
    folder = run_file.parent / "runs" / "quickstart-dflash-smoke"
    rows = [json.loads(line) for line in (folder / "regenerate" / "conversations.jsonl").read_text().splitlines()]
    assert {row["thinking"] for row in rows} == {True, False}
    assert [row["thinking"] for row in rows] == [thinks(0.5, row["id"]) for row in rows]
    # The empty think block is part of the prompt where the target does not think.
    lengths = {mode: {len(row["prompt_ids"]) for row in rows if row["thinking"] is mode} for mode in (True, False)}
    assert max(lengths[False]) > max(lengths[True])
    results = json.loads((folder / "metrics.json").read_text())["results"]
    assert [one["thinking"] for one in results] == [False, True]
    assert len({one["prompts_digest"] for one in results}) == 2
    assert all(not one["mismatches"] for one in results)
    report = (folder / "report.md").read_text()
    assert "held-out with thinking" in report
    assert "held-out without thinking" in report
    capsys.readouterr()
    assert main(["report", str(folder), str(folder)]) == 0
    assert "with thinking" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0.0", "1.0", "-0.5", "2", '"some"'])
def test_what_is_no_share_is_refused(run_file: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert main(["config", "check", str(run_file), "--set", f"regenerate.thinking={value}"]) == 2
    assert "regenerate.thinking" in capsys.readouterr().err


def test_a_share_needs_the_targets_own_answers(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["--set", 'run.stages=["cache", "train"]', "--set", "regenerate.thinking=0.5"]
    assert main(["config", "check", str(run_file), *stages]) == 2
    assert "needs the regenerate stage" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0.5", "true"])
def test_a_template_without_modes_has_no_thinking_to_choose(
    run_file: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    """Both modes would ask the same prompts."""
    command = ["run", str(run_file), "--dry-run", "--set", f"regenerate.thinking={value}"]
    assert main(command) == 2
    assert "the chat template has no thinking mode" in capsys.readouterr().err
    (run_file.parent / "modes.jinja").write_text(MODES)
    assert main([*command, "--set", 'target.chat_template="modes.jinja"']) == 0
    # A target that always thinks.
    always = MODES.replace("{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}", "<think>\n")
    assert always != MODES
    (run_file.parent / "always.jinja").write_text(always)
    expected = {"true": 0, "0.5": 2}[value]
    assert main([*command, "--set", 'target.chat_template="always.jinja"']) == expected


def test_a_mode_that_is_not_there_is_refused_in_python_too(target: Any) -> None:
    with pytest.raises(ds.DeepSpecError, match="no thinking mode"):
        ds.generate(target, None, ["Hi"], thinking=True, max_new_tokens=1)
    # Token ids are asked as they are.
    assert ds.generate(target, None, [[5, 6]], thinking=True, max_new_tokens=1)
