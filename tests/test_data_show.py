"""`deepspec data show`, and that every stage renders conversations alike: one system prompt or none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.data import _text
from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.data.conversations import from_row
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.showing import Shown
from deepspec_core.plugins.discovery import load_plugins

ROWS = (
    {"id": "mute", "messages": [{"role": "user", "content": "Hi"}]},
    {"id": "short", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]},
    {"id": "good", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]},
    {"id": "good", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]},
    {"id": "tokens", "input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 1, 1]},
    {"id": "long", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "word " * 99}]},
)
RUN = """
[run]
name = "a"
output = "out"
stages = ["train"]
[target]
model = "target"
layers = [1, 3]
[data]
sources = [{path = "rows.jsonl"}]
held_out = 0.0
max_length = 64
min_supervised_tokens = 3
[draft]
type = "dflash"
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run whose target has no weights at all."""
    builtin = load_plugins().registry.load("builtin", "tiny-qwen3")()
    shutil.copytree(builtin, tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def _show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["data", "show", *arguments]) == 0
    return capsys.readouterr().out


def test_held_out_prompts_that_are_no_unicode_are_left_out(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"{text}-{i}", "turns": [f"{i} {text}"]} for i in range(12) for text in ("whole", "half \ud800")]
    (run_file.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = _show(capsys, str(run_file), "--split", "held_out", "-n", "24", "--set", "data.held_out=0.5")
    assert "whole" in text
    assert "half" not in text


def test_samples_with_their_supervised_text_and_what_was_dropped(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _show(capsys, str(run_file), "-n", "5")
    assert text.startswith("samples of data.sources\n")
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello there.<|im_end|>»\n" in text
    assert "id tokens: 5 tokens, 3 supervised\n" in text
    assert "id long: 64 tokens, " in text
    assert "cut at the length limit" in text
    assert "3 of 5 shown: there are no more" in text
    assert "dropped mute: no answer to a user's message" in text
    assert "dropped short: 2 supervised tokens of at least 3" in text
    assert "1 duplicates" in text
    assert "1 with token ids of their own" in text
    assert "\x1b" not in text
    first = _show(capsys, str(run_file), "-n", "1")
    assert "id good" in first
    assert "id long" not in first
    system = _show(capsys, str(run_file), "-n", "1", "--set", "data.system_prompt=Be brief.")
    assert "<|im_start|>system\nBe brief.<|im_end|>" in system
    newline = _show(capsys, str(run_file), "-n", "2", "--set", "data.supervise_newline=true")
    assert "«Hello there.<|im_end|>\n»" in newline


def test_colours_on_a_terminal() -> None:
    shown = Shown(id="a", pieces=(("Hi", False), ("Hello", True)), tokens=2, supervised=1, is_prompt=False)
    assert _text(shown, False) == "Hi«Hello»"
    assert _text(shown, True) == "Hi\x1b[32mHello\x1b[0m"


def test_prompts_before_regeneration_and_held_out_ones(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = _show(capsys, str(run_file), "--set", 'run.stages=["regenerate", "train"]', "-n", "2")
    assert "nothing is regenerated yet" in asked
    assert "prompt 1, id mute" in asked
    assert asked.count("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n") == 2
    assert "«" not in asked
    held_out = _show(capsys, str(run_file), "--split", "held_out", "--set", "data.held_out=0.5", "-n", "1")
    assert held_out.startswith("held-out prompts")
    assert "prompt 1" in held_out


def test_the_regenerated_conversations_where_there_are_any(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = _show(capsys, str(finished), "--set", "run.output=runs/quickstart-dflash-smoke", "-n", "2")
    assert text.startswith("samples of ")
    assert "conversations.jsonl" in text.partition("\n")[0]
    assert text.count("--- sample") == 2
    assert text.count("«") == 2
    assert "2 with token ids of their own" in text


def test_published_choices_are_refused_where_the_target_answers_itself(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", 'run.stages=["regenerate", "train"]', "--set", "data.supervise_newline=true"]
    assert main(["config", "check", str(run_file), *changes]) == 2
    assert "data.supervise_newline" in capsys.readouterr().err
    assert main(["config", "check", str(run_file), *changes[2:]]) == 0


@pytest.mark.parametrize("prompt", ["Be brief.", pytest.param(None, marks=pytest.mark.slow)])
def test_one_system_prompt_in_regeneration_training_and_evaluation(
    prompt: str | None, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f'data.system_prompt="{prompt}"'] if prompt else []
    changes = [
        'target.model="builtin:tiny-qwen3"', 'data.sources=[{path="builtin:tiny-dialogues",limit=2}]',
        'run.stages=["regenerate", "train", "evaluate"]', "regenerate.max_tokens=12", "draft.num_layers=1",
        "data.min_supervised_tokens=1", "data.max_length=128", "draft.num_anchors=4", "train.max_steps=1",
        'train.precision="float32"', "evaluate.limit=1", "evaluate.max_new_tokens=4", "evaluate.plain=false", *given,
    ]  # fmt: skip
    prompts: list[str] = []
    samples: list[str] = []
    render_prompt, read = ChatTokenizer.render_prompt, ChatTokenizer.tokenised

    def recorded_prompt(self: ChatTokenizer, *arguments: Any, **options: Any) -> tuple[int, ...]:
        ids = render_prompt(self, *arguments, **options)
        prompts.append(self.decode(ids))
        return ids

    def recorded_samples(self: ChatTokenizer, *arguments: Any, **options: Any) -> list[list[Any]]:
        found = read(self, *arguments, **options)
        samples.extend(self.decode(sample.input_ids) for of_one in found for sample in of_one)
        return found

    monkeypatch.setattr(ChatTokenizer, "render_prompt", recorded_prompt)
    monkeypatch.setattr(ChatTokenizer, "tokenised", recorded_samples)
    assert main(["run", str(run_file), *(part for change in changes for part in ("--set", change))]) == 0
    # One is tried before the first stage, to see how much room a system prompt leaves.
    assert len(set(prompts)) == 1 + 2 + 1
    assert len(samples) == 2
    # Training on answers that came as text renders them under the same prompt.
    run = Run(
        file=load_run_file(run_file, overrides=given, plugins=load_plugins()), path=run_file, plugins=load_plugins()
    )
    rows = [from_row(row, "test") for row in ROWS[2:3]]
    assert len(list(run.data.tokenized(rows, run.data.counts))) == 1
    begin = f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n" if prompt else "<|im_start|>user\n"
    assert len(samples) == 3
    assert all(text.startswith(begin) for text in (*prompts, *samples))


def test_the_targets_own_stop_tokens_are_looked_for(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(["A1 and B1 and so on", "A2 and B2<|endoftext|>Q: and C?"])
    ]
    (run_file.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = ["--set", 'data.sources=[{path="rows.jsonl"}]', "--set", "data.held_out=0.0", "--set", "evaluate.tasks=[]"]
    told += [
        "--set",
        'run.stages=["train"]',
        "--set",
        "data.min_supervised_tokens=1",
        "--set",
        'features.mode="online"',
    ]
    assert main(["data", "show", str(run_file), *told]) == 0
    assert "1 with a control token of the chat template or a stop token of the target" in capsys.readouterr().out
