"""Drafts that are not trained, through commands and from Python: prompt lookup, and a small language model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli
from transformers import AutoModelForCausalLM

import deepspec_core as ds
from deepspec_core.cli.main import main
from deepspec_core.errors import ConfigError
from deepspec_core.interface.models import Target
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.untrained.named import listed, untrained_of
from deepspec_targets.builtin import tiny_qwen3

TINY = "builtin:tiny-qwen3"
RUN = """
[run]
name = "baseline"
output = "runs/baseline"
stages = ["evaluate"]
threads = 1
[target]
model = "builtin:tiny-qwen3"
[data]
sources = [{path = "builtin:tiny-dialogues"}]
[draft]
type = "TYPE"
[evaluate]
temperature = [0.0, 1.0]
limit = 3
batch_size = 3
max_new_tokens = 12
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example_plugin: Callable[[str], None]) -> Path:
    """The working directory, where lookup is installed."""
    example_plugin("deepspec-lookup")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"turns": [f"What is {n} + 4?"]}) + "\n" for n in range(3)))
    return tmp_path


@pytest.fixture
def lookup(folder: Path) -> Path:
    path = folder / "lookup.toml"
    path.write_text(RUN.replace("TYPE", "lookup"))
    return path


@pytest.fixture
def small_lm(folder: Path) -> Path:
    """The target in a directory of its own drafts for itself."""
    shutil.copytree(tiny_qwen3(), folder / "small")
    path = folder / "small-lm.toml"
    path.write_text(RUN.replace('"TYPE"', '"small-lm"\nmodel = "small"\nmax_tokens = 3'))
    return path


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in:\n{message}"


def results(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "metrics.json").read_text())["results"]
    return found


def test_a_run_has_one_stage(lookup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(lookup), "--smoke"]) == 0
    folder = lookup.parent / "runs" / "baseline-smoke"
    draft = json.loads((folder / "metrics.json").read_text())["draft"]
    assert (draft["algorithm"], draft["parameters"], draft["checkpoint"], draft["taps"]) == ("lookup", 0, None, [])
    assert [result["mismatches"] for result in results(folder)] == [[], []]
    assert "lookup draft" in (folder / "report.md").read_text()
    assert main(["config", "check", str(folder / "config.toml")]) == 0
    assert main(["run", str(lookup), "--smoke"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    refused(capsys, ["run", str(lookup), "--smoke", "--set", "draft.max_tokens=2"], "draft.max_tokens", "--force")
    refused(capsys, ["calibrate", str(folder)], "gives no confidence")
    refused(capsys, ["export", str(folder), "--to", "vllm"], "no draft checkpoint in this directory")


def test_the_target_as_its_own_draft_has_every_token_accepted(small_lm: Path) -> None:
    """Its embedding is padded to another size, as those of one series are."""
    model = AutoModelForCausalLM.from_pretrained(small_lm.parent / "small")
    model.resize_token_embeddings(1100)
    model.save_pretrained(small_lm.parent / "small")
    assert main(["run", str(small_lm)]) == 0
    folder = small_lm.parent / "runs" / "baseline"
    assert [result["conditional"] for result in results(folder)] == [[1.0, 1.0, 1.0]] * 2
    draft = json.loads((folder / "metrics.json").read_text())["draft"]
    assert draft["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert draft["trainable_parameters"] == 0


def test_another_model_is_another_draft(small_lm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(small_lm), "--set", "evaluate.limit=1", "--set", "evaluate.max_new_tokens=2"]
    assert main(command) == 0
    weights = small_lm.parent / "small" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    refused(capsys, command, "The draft changed after the stage", "--force evaluate")


def test_another_tokenizer_is_refused_before_the_first_stage(
    small_lm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_lm.parent / "small" / "tokenizer.json"
    known = json.loads(path.read_text())
    first, second = [token for token, number in known["model"]["vocab"].items() if number in (40, 41)]
    known["model"]["vocab"] |= {first: 41, second: 40}
    path.write_text(json.dumps(known))
    refused(
        capsys, ["run", str(small_lm), "--dry-run"], "the draft's tokenizer is not the target's", "2 with another id"
    )
    assert not (small_lm.parent / "runs").exists()


def test_fewer_positions_than_the_target_are_a_warning(small_lm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_lm.parent / "small" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 64}))
    assert main(["run", str(small_lm), "--dry-run"]) == 0
    assert "small has 64 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ('run.stages=["train", "evaluate"]', ["run.stages", "are not trained", 'run.stages = ["evaluate"]']),
        ('run.stages=["evaluate", "export"]', ["run.stages", "are not trained"]),
        ("draft.layer.window=64", ["draft.layer", "no layers whose shape could be set"]),
        ("evaluate.draft=small", ["evaluate.draft", "no checkpoint to evaluate"]),
        ("evaluate.confidence_threshold=0.5", ["confidence_threshold", "gives no confidence"]),
        ("draft.longest=0", ["draft.longest"]),
    ],
)
def test_what_it_has_no_use_for_is_refused(
    lookup: Path, capsys: pytest.CaptureFixture[str], override: str, parts: list[str]
) -> None:
    refused(capsys, ["run", str(lookup), "--dry-run", "--set", override], *parts)


def test_training_is_not_estimated(lookup: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["estimate", str(lookup)], "drafts of this type are not trained", "lookup.toml: draft.type")


def test_init_writes_the_sections_that_are_read(folder: Path) -> None:
    made = folder / "train.toml"
    assert main(["init", TINY, "--draft", "small-lm", "--data", "builtin:tiny-dialogues"]) == 0
    assert tomli.loads(made.read_text()).keys() == {"run", "target", "data", "draft", "evaluate"}
    assert main(["config", "check", str(made), "--set", f"draft.model={TINY}"]) == 0


def test_a_draft_is_evaluated_without_a_run_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--target", TINY, "--task", "task.jsonl", "--temperature", "0", "--max-new-tokens", "8"]
    assert main([*command, "--draft", "lookup:max_tokens=3"]) == 0
    (result,) = results(folder / "evaluation-lookup_max_tokens_3")
    assert result["samples"] == 3
    assert result["mismatches"] == []
    refused(capsys, [*command, "--draft", "lookup:max_token=3"], "lookup:max_token=3", "options")
    refused(capsys, [*command, "--draft", "small-lm"], "missing key", "small-lm:model")


def test_from_python(target: Target) -> None:
    prompts = ["Count from 3 to 9.", "What is 17 + 25?"]
    plain = ds.generate(target, None, prompts, max_new_tokens=12)
    again = ds.load_target(TINY)  # `target` was opened before lookup was installed for this test
    for name in ("lookup", f"small-lm:{TINY}"):
        draft = ds.load_draft(name, again)
        assert draft.description.algorithm == name.split(":")[0]
        assert name in repr(draft)
        found = ds.generate(target, draft, prompts, max_new_tokens=12, batch_size=2)
        assert [one.ids for one in found] == [one.ids for one in plain]
    (figures,) = ds.evaluate(target, draft, {"mine": prompts}, temperature=0, max_new_tokens=6)
    assert figures.accepted_length > 3


def test_how_drafts_are_named(folder: Path) -> None:
    registry = load_plugins().registry

    def named(text: str) -> Any:
        found = untrained_of(text, base=folder, registry=registry)
        return None if found is None else (found.type, found.options)

    assert named("lookup") == named("lookup:max_tokens=7")
    assert named("small-lm:some/model=x")[1].model == "some/model=x"
    assert named("small-lm:model=org/name,max_tokens=2")[1].max_tokens == 2
    assert named("hf:some/model") == named("small-lm:some/model")
    assert named("org/lookup") is None
    for text, said in (
        ("dflash", "is trained, so its checkpoint"),
        ("lookpu", "write 'lookup'"),
        ("mine", "lookup or"),
    ):
        with pytest.raises(ConfigError, match=f"(?s)--draft.*{said}|{said}.*--draft"):
            untrained_of(text, base=folder, registry=registry, where="--draft")
    (folder / "lookup").mkdir()
    assert named("lookup") is None, "a folder wins"
    with pytest.raises(ConfigError, match="options among max_tokens"):
        named("lookup:7")


def test_a_draft_that_is_none_is_told_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No Hub is asked for a name without an owner."""
    asked = ["evaluate", "--target", TINY, "--task", "task.jsonl", "--draft"]
    for name in ("lookpu", "dspark", "lookups:max_tokens=2"):
        refused(capsys, [*asked, name], "--draft", "lookup or small-lm")
    refused(capsys, [*asked, "promptlookup-nothing-like-it"], "examples/plugins/deepspec-lookup")
    registry = load_plugins().registry
    assert listed("small-lm:model=a,max_tokens=2,nowhere,hf:b", registry) == [
        "small-lm:model=a,max_tokens=2",
        "nowhere",
        "hf:b",
    ]


@pytest.mark.slow
def test_baselines_beside_a_runs_draft(small_lm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", str(small_lm), "--set", "evaluate.temperature=0", "--set", "evaluate.max_new_tokens=6"]
    assert main([*command, "--with", "lookup,lookup:max_tokens=2,longest=2"]) == 0
    folder = small_lm.parent / "runs" / "baseline" / "compare"
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["baseline", "lookup", "lookup:max_tokens=2,longest=2"]
    assert all(row["comparable"] for row in rows)
    assert rows[0]["ahead"] is None
    for row in rows[1:]:
        assert row["ahead"] == pytest.approx(rows[0]["acceptance_length"] - row["acceptance_length"])
        assert row["ahead_interval"][0] <= row["ahead"] <= row["ahead_interval"][1]
    assert "run's draft ahead by" in (folder / "comparison.md").read_text()
    page = (folder / "comparison.html").read_text()
    assert page.count("lookup:max_tokens=2,longest=2") > 2
    assert "<svg" in page
    capsys.readouterr()
    assert main([*command, "--with", "lookup"]) == 0
    assert capsys.readouterr().out.count("already complete") == 2
    refused(capsys, [*command, "--with", "dflash"], "--with", "lookup or small-lm")
    refused(
        capsys,
        [*command, "--with", "lookup", "--beside", "nowhere"],
        "There is no evaluation in this folder",
        "nowhere",
    )
    # A table alone, without its rounds: said before the first evaluation, and the rest is written.
    (alone := small_lm.parent / "alone").mkdir()
    shutil.copy(folder / "lookup" / "metrics.json", alone)
    assert main([*command, "--with", "lookup", "--beside", str(alone)]) == 0
    out = capsys.readouterr().out
    assert out.index(f"no difference from {alone}") < out.index("already complete")
    compared = json.loads((folder / "comparison.json").read_text())
    ahead = {row["run"]: row["ahead"] for row in compared["rows"]}
    assert ahead[str(alone)] is None
    assert ahead["lookup"] is not None
    assert any("rounds of an evaluation are missing" in remark for remark in compared["remarks"])
    # The rounds of another draft.
    shutil.copytree(small_lm.parent / "runs" / "baseline" / "evaluate", alone / "evaluate")
    assert main([*command, "--with", "lookup", "--beside", str(alone)]) == 0
    compared = json.loads((folder / "comparison.json").read_text())
    assert {row["run"]: row["ahead"] for row in compared["rows"]}[str(alone)] is None
    assert any("A journal does not belong to metrics.json" in remark for remark in compared["remarks"])
    refused(capsys, [*command, "--with", "baseline"], "--with", "same name as the run")
    refused(capsys, [*command, "--with", "small-lm:model=a/b,small-lm:model=a_b"], "--with", "share one folder")


@pytest.mark.slow
def test_later_turns_after_sampled_answers_have_a_difference(small_lm: Path, folder: Path) -> None:
    """They follow each draft's own answers. Where there is no difference, a remark says why."""
    questions = [json.dumps({"turns": [f"What is {n} + 4?", "And twice that?"]}) for n in range(3)]
    (folder / "turns.jsonl").write_text("\n".join(questions) + "\n")
    settings = ("temperature=1.0", "turns=all", 'tasks=["turns.jsonl"]')
    command = ["compare", str(small_lm), *(part for one in settings for part in ("--set", f"evaluate.{one}"))]
    # A file of the same name with other questions.
    (folder / "other").mkdir()
    (folder / "other" / "turns.jsonl").write_text(questions[1] + "\n")
    asked = ["--draft", "lookup", "--target", TINY, "--task", "other/turns.jsonl", "--temperature", "1"]
    assert main(["evaluate", *asked, "--max-new-tokens", "6", "--batch-size", "3", "--out", "asked"]) == 0
    command += ["--set", "evaluate.max_new_tokens=6"]
    assert main([*command, "--with", "lookup", "--beside", "asked"]) == 0
    compared = json.loads((folder / "runs" / "baseline" / "compare" / "comparison.json").read_text())
    rows = {row["run"]: row for row in compared["rows"]}
    assert rows["lookup"]["ahead"] == pytest.approx(
        rows["baseline"]["acceptance_length"] - rows["lookup"]["acceptance_length"]
    )
    assert rows["asked"]["ahead"] is None
    (said,) = (remark for remark in compared["remarks"] if "difference from" in remark)
    assert said.startswith(
        "no difference from asked on other/turns.jsonl at temperature 1: prompts with the same names"
    )
