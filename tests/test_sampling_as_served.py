"""Sampling as a user serves, from end to end: what `evaluate` and `generate` do with it, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

import deepspec_core
from deepspec_core.cli.main import main
from deepspec_core.decoding.engine import Completion, Request, Round
from deepspec_core.errors import ConfigError
from deepspec_core.evaluation.evaluator import recorded
from deepspec_core.evaluation.metrics import pool
from deepspec_core.evaluation.paired import paired_difference
from deepspec_core.evaluation.requests import repeated
from deepspec_core.evaluation.turns import first_turn_of, prompt_of
from deepspec_core.pipeline.evaluating import journal_of

TINY = "builtin:tiny-qwen3"
ROWS = [{"turns": ["What is 17 + 25?", "And twice that?"]}, {"turns": ["Tell me a story about a fox."]}]
SERVED = ["--top-p", "0.95", "--top-k", "40", "--min-p", "0.01", "--repetition-penalty", "1.2", "--stop", "."]


@pytest.fixture(scope="module")
def evaluated(drafts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The command of an evaluation, greedy and with two samples of each prompt, and its folder."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["evaluate", "--draft", str(drafts["dspark"]), "--target", TINY, "--task", str(folder / "task.jsonl")]
    command += ["--temperature", "0", "--temperature", "1", "--turns", "all", "--samples", "2"]
    command += ["--max-new-tokens", "12", "--batch-size", "3", "--out", str(folder / "run")]
    assert main([*command, *SERVED]) == 0
    return command, folder / "run"


@pytest.mark.slow
def test_an_evaluation_draws_as_it_is_told_and_says_so(evaluated: tuple[list[str], Path], target: Any) -> None:
    report = json.loads((evaluated[1] / "metrics.json").read_text())
    told = {"top_p": 0.95, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "stop": ["."], "samples": 2}
    assert told.items() <= report["settings"].items()
    assert "repetition_penalty: 1.2" in (evaluated[1] / "report.md").read_text()
    greedy, sampled = report["results"]
    assert greedy["mismatches"] == []
    assert (greedy["samples"], sampled["samples"]) == (3, 6), "three turns; two samples of each above temperature 0"
    groups = recorded(journal_of(evaluated[1], sampled))[1]
    outputs = {done.id: done for group in groups for done in group.completions}
    assert len({prompt_of(name) for name in outputs}) == 2
    firsts = [name for name in outputs if first_turn_of(name) == name]
    assert len(firsts) == 4
    pairs = [[outputs[name].output_ids for name in firsts if prompt_of(name) == one] for one in map(prompt_of, firsts)]
    assert any(one != other for one, other in pairs), "two samples are two draws"
    for done in outputs.values():
        text = target.tokenizer.decode(done.output_ids, skip_special_tokens=True)
        shorter = target.tokenizer.decode(done.output_ids[:-1], skip_special_tokens=True)
        assert "." not in shorter, "nothing follows the token with the stop string"
        assert ("." in text) <= (done.finish_reason == "stop")


def test_other_settings_are_other_results(
    evaluated: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*evaluated[0], *SERVED[2:]]) == 2
    assert "top_p" in capsys.readouterr().err


def test_a_generated_text_ends_before_the_stop_string(target: Any, drafts: dict[str, Path]) -> None:
    draft = deepspec_core.load_draft(drafts["dflash"], target)
    [whole] = deepspec_core.generate(target, None, "Count from 3 to 9.", max_new_tokens=24)
    middle = len(whole.text) // 2
    stop = whole.text[middle - 2 : middle + 2]
    parts: list[str] = []
    options: dict[str, Any] = {"max_new_tokens": 24, "stop": [stop]}
    [found] = deepspec_core.generate(
        target, draft, "Count from 3 to 9.", **options, on_round=lambda part: parts.append(part.text)
    )
    assert found.text == whole.text[: whole.text.index(stop)]
    assert "".join(parts) == found.text
    assert found.finish_reason == "stop"
    assert found.ids == whole.ids[: len(found.ids)]
    [plain] = deepspec_core.generate(target, None, "Count from 3 to 9.", **options)
    assert (plain.ids, plain.text) == (found.ids, found.text)


def test_a_greedy_penalty_is_that_of_transformers(target: Any, drafts: dict[str, Path]) -> None:
    draft, model = deepspec_core.load_draft(drafts["dspark"], target), target.model.model
    prompts = ["Tell me a story about a fox.", "What is 17 + 25?"]
    found = deepspec_core.generate(target, draft, prompts, max_new_tokens=16, repetition_penalty=1.5, batch_size=2)
    for one in found:
        import torch

        expected = model.generate(
            torch.tensor([one.prompt_ids]), do_sample=False, max_new_tokens=16, repetition_penalty=1.5,
            eos_token_id=list(target.architecture.stop_token_ids), pad_token_id=0,
        )  # fmt: skip
        assert tuple(expected[0, len(one.prompt_ids) :].tolist()) == one.ids


@pytest.mark.parametrize(
    "setting",
    ["top_p=0.0", "top_p=1.5", "top_k=-1", "min_p=2.0", "repetition_penalty=0.0", 'stop=[""]', 'stop="x"', "samples=0"],
)
def test_bad_values_are_refused_before_the_first_stage(
    run_file: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(run_file), "--dry-run", "--set", f"evaluate.{setting}"]) == 2
    assert setting.partition("=")[0] in capsys.readouterr().err


def test_samples_of_greedy_answers_alone_are_refused(
    run_file: Path, target: Any, drafts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "evaluate.samples=2", "--set", "evaluate.temperature=[0.0]"]
    assert main(["run", str(run_file), "--dry-run", *settings]) == 2
    assert "evaluate.samples" in capsys.readouterr().err
    draft = deepspec_core.load_draft(drafts["dspark"], target)
    with pytest.raises(ConfigError, match="samples"):
        deepspec_core.evaluate(target, draft, {"own": ["x"]}, temperature=0, samples=2)


def test_samples_have_names_and_seeds_of_their_own() -> None:
    requests = [Request(id=name, prompt_ids=(1,), seed=seed) for name, seed in (("a", 5), ("b (sample 9", 6))]
    several = repeated(requests, 3)
    assert several[0] == requests[0]
    assert several[3] == requests[1]
    assert len({one.id for one in several}) == len({one.seed for one in several}) == 6
    assert [prompt_of(one.id) for one in several] == ["a"] * 3 + ["b (sample 9"] * 3
    assert prompt_of(f"{several[1].id} (turn 2)") == "a"
    assert repeated(requests, 2)[1] == several[1]


def _answers(samples: int, more: int = 0) -> list[Completion]:
    """Twelve prompts with so many equal answers each."""
    return [
        Completion(
            id=one.id, prompt_ids=one.prompt_ids, output_ids=(1,), finish_reason="stop",
            rounds=tuple(Round(4, k, k + 1 + more) for k in range(1 + int(one.prompt_ids[0]) % 4)),
        )
        for one in repeated([Request(id=str(i), prompt_ids=(i,), seed=i) for i in range(12)], samples)
    ]  # fmt: skip


def test_intervals_draw_the_answers_to_a_prompt_together() -> None:
    one, five = pool(_answers(1)), pool(_answers(5))
    assert five.samples == 60
    # Five times the same answers say no more than one.
    assert five.acceptance_length_interval == one.acceptance_length_interval
    assert paired_difference(_answers(5), _answers(5, more=1), seed=0) == paired_difference(
        _answers(1), _answers(1, more=1), seed=0
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "200"),
        ("--temperature", "1e-40"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", "nan"),
        ("--min-p", "nan"),
        ("--repetition-penalty", "nan"),
        ("--confidence-threshold", "nan"),
        ("--stop", ""),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--draft", "mine", "--target", TINY, "--task", "t.jsonl", option, value]) == 2
    said = capsys.readouterr().err
    assert f"Error: {option}: found" in said
    assert said.count(": found") == 1


def test_a_temperature_that_is_given_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--draft", "mine", "--target", TINY, "--task", "t.jsonl"]
    assert main([*command, "--temperature", "0.5", "--temperature", "0", "--temperature", "0.50"]) == 2
    assert "--temperature: found [0.5, 0.0, 0.5]" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["200", "nan"])
def test_a_temperature_that_cannot_be_is_not_sent(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--server", "http://127.0.0.1:9", "--target", TINY, "--task", "t.jsonl"]
    assert main([*command, "--temperature", value]) == 2
    assert "--temperature: found" in capsys.readouterr().err
