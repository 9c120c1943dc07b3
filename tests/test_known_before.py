"""What can be known before the first stage is said before it: no stage has run when the message comes."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.errors import ConfigError
from deepspec_core.pipeline.checking import check_before
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.smoke import smoke
from deepspec_core.pipeline.stages import Step, plan
from deepspec_core.plugins.discovery import load_plugins

Refused = Any


def _planned(path: Path, *overrides: str) -> tuple[Run, list[Step]]:
    plugins = load_plugins()
    run = Run(file=load_run_file(path, overrides=overrides, plugins=plugins), path=path, plugins=plugins)
    return run, plan(run)


@pytest.fixture
def refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(*overrides, says=(...)): the run ends with exit code 2 and these parts before anything is written."""

    def check(*overrides: str, says: tuple[str, ...]) -> None:
        arguments = [word for text in overrides for word in ("--set", text)]
        assert main(["run", str(run_file), "--smoke", *arguments]) == 2
        seen = capsys.readouterr()
        assert "starting" not in seen.out
        assert "Traceback" not in seen.err
        for part in says:
            assert part in seen.err, f"{part!r} is not in:\n{seen.err}"
        runs = run_file.parent / "runs"
        assert not runs.exists() or not list(runs.rglob("stage.json"))

    return check


def test_a_loss_term_the_draft_cannot_serve(refused: Refused) -> None:
    refused(
        "loss.terms={ce=1.0,confidence=1.0}",
        says=("loss term 'confidence' reads what this draft does not provide", "confidence_logits"),
    )


def test_a_calibration_of_a_draft_that_is_yet_to_be_trained(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was fitted to the draft of before, and would be refused hours later, when evaluation begins."""
    named = ["--set", "evaluate.calibration=runs/calibration.json"]
    assert main(["run", str(run_file), *named]) == 2
    seen = capsys.readouterr()
    assert "no calibration can be of a draft that is yet to be trained" in seen.err
    assert "evaluate.calibration" in seen.err
    assert "deepspec calibrate" in seen.err
    assert "starting" not in seen.out


def test_a_smoke_run_leaves_the_calibration_out(run_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its draft is another one than the calibration's."""
    file = load_run_file(run_file, overrides=["evaluate.calibration=calibration.json"], plugins=load_plugins())
    assert smoke(file).evaluate.calibration is None
    assert "--smoke leaves evaluate.calibration out" in caplog.text


def test_an_optimizer_without_a_matrix_to_train(
    refused: Refused, run_file: Path, example_plugin: Callable[[str], None]
) -> None:
    example_plugin("deepspec-medusa")
    text = run_file.read_text().replace('type = "dflash"', 'type = "medusa"')
    run_file.write_text(text.replace("block_size = 5\nnum_layers = 3\n", ""))
    refused(
        'train.optimizer="muon"', says=("no matrix that Muon could train", "train.optimizer", "3 trained parameters")
    )


def test_tool_results_that_the_template_cannot_replay(refused: Refused, run_file: Path) -> None:
    said = [{"role": "user", "content": "Paris?"}, {"role": "tool", "content": "sunny"}]
    rows = [{"messages": said[:1]}] * 3 + [{"messages": said}]
    (run_file.parent / "tools.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source, held_out = 'data.sources=[{path="tools.jsonl"}]', "data.held_out=1e-9"
    says = ("writes no tool calls", "1 of 4 conversations", "regenerate.max_failures")
    refused(source, held_out, "regenerate.max_failures=0.2", says=says)


def test_servers_to_regenerate_with(refused: Refused) -> None:
    refused('regenerate.servers=["http://127.0.0.1:1"]', says=("no server answers", "regenerate.servers"))
    refused('regenerate.servers=["127.0.0.1:1"]', says=("an address such as http://host:8000/v1",))
    refused(
        'regenerate.servers=["http://me:secret@host/v1"]',
        says=("an address without user, password or query", "api_key_env"),
    )
    key = 'regenerate.api_key_env="DEEPSPEC_NO_SUCH_KEY"'
    refused('regenerate.servers=["http://127.0.0.1:1"]', key, says=("DEEPSPEC_NO_SUCH_KEY is not set",))


def test_kernels_that_cannot_run(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec_core.rows.kernels.choice._why_no_triton", lambda _: "there is no GPU")
    from deepspec_core.rows.kernels import choice

    choice._kernels.cache_clear()
    refused('loss.kernels="triton"', says=("Triton kernels cannot run here", "there is no GPU"))


def test_a_task_file_that_is_missing_or_damaged(refused: Refused, run_file: Path) -> None:
    refused('evaluate.tasks=["questions.jsonl"]', says=("A task's file is missing", "questions.jsonl"))
    (run_file.parent / "questions.jsonl").write_text('{"turns": ["one"]}\n{"question": 1}\n')
    refused('evaluate.tasks=["questions.jsonl"]', says=("question is neither text", "questions.jsonl:2"))
    (run_file.parent / "questions.jsonl").write_text('{"turns": ["one"]}\n{"turns": ["a <|im_end|> b"]}\n')
    refused('evaluate.tasks=["questions.jsonl"]', says=("control token", "questions.jsonl:2"))


def test_a_dry_run_says_it_too(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(run_file), "--smoke", "--dry-run", "--set", 'evaluate.tasks=["questions.jsonl"]']) == 2
    seen = capsys.readouterr()
    assert "evaluate: would run" in seen.out
    assert "A task's file is missing" in seen.err


def test_two_tasks_of_one_name(refused: Refused, run_file: Path) -> None:
    for folder in ("a", "b"):
        (run_file.parent / folder).mkdir()
        (run_file.parent / folder / "same.jsonl").write_text('{"turns": ["one"]}\n')
    refused('evaluate.tasks=["a/same.jsonl", "b/same.jsonl"]', says=("write the same file of results",))


def test_prompts_that_leave_no_room(refused: Refused, run_file: Path) -> None:
    (run_file.parent / "long.jsonl").write_text(json.dumps({"turns": ["word " * 5000]}) + "\n")
    refused('evaluate.tasks=["long.jsonl"]', says=("too long for the target", "long.jsonl"))


def test_nothing_to_evaluate_on(refused: Refused, run_file: Path) -> None:
    refused("evaluate.tasks=[]", says=("evaluate.tasks", "at least one task"))
    (run_file.parent / "chats.jsonl").write_text('{"turns": ["one"]}\n')
    refused(
        'data.sources=[{path = "chats.jsonl"}]',
        "data.held_out=0.0",
        says=("no prompts are held out", "data.held_out"),
    )


def test_no_temperature_to_evaluate_at(refused: Refused) -> None:
    refused("evaluate.temperature=[]", says=("no temperature to evaluate at", "evaluate.temperature"))


def test_sources_too_small_to_hold_a_prompt_out(refused: Refused, run_file: Path) -> None:
    (run_file.parent / "chats.jsonl").write_text('{"turns": ["one"]}\n')
    refused('data.sources=[{path = "chats.jsonl"}]', says=("No prompt is held out", "data.held_out"))


def test_a_second_source_that_is_missing(refused: Refused) -> None:
    refused(
        'data.sources=[{path = "builtin:tiny-dialogues", limit = 5}, {path = "gone.jsonl", weight = 0.001}]',
        says=("A source of conversations is missing", "gone.jsonl"),
    )


def test_malformed_rows_of_a_source(refused: Refused, run_file: Path) -> None:
    row = json.dumps({"turns": ["one"]}) + "\n"
    (run_file.parent / "chats.jsonl").write_text(row * 5 + "{broken\n" * 2 + row)
    refused('data.sources=[{path = "chats.jsonl"}]', says=("2 of 8 rows. 2: A line is not JSON", "chats.jsonl:7"))
    (run_file.parent / "chats.jsonl").write_text("")
    refused('data.sources=[{path = "chats.jsonl"}]', says=("There is no conversation to train on", "chats.jsonl"))


@pytest.mark.parametrize(
    ("key", "value", "more"),
    [
        ("data.min_supervised_tokens", "2000", ()),
        ("data.system_prompt", f'"{"word " * 3000}"', ()),
        ("data.max_length", "18", ()),
        ("data.max_length", "18", ('data.system_prompt="Be brief."',)),
    ],
)
def test_no_sample_could_hold_what_must_be_supervised(
    run_file: Path, key: str, value: str, more: tuple[str, ...]
) -> None:
    run, steps = _planned(run_file, f"{key}={value}", "regenerate.max_tokens=4096", *more)
    with pytest.raises(ConfigError, match="every sample would be dropped") as problem:
        check_before(run, steps)
    assert str(problem.value.where).endswith(key)


def test_answers_too_short_to_be_kept(run_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"turns": [f"Say {number}", "More"]} for number in range(30)]
    (run_file.parent / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    given = 'data.sources=[{path = "chats.jsonl"}]'
    run, steps = _planned(run_file, "regenerate.max_tokens=6", given)
    with pytest.raises(ConfigError, match="dropped as too short") as problem:
        check_before(run, steps)
    assert str(problem.value.where).endswith("regenerate.max_tokens")
    # Two answers of seven tokens are enough.
    check_before(*_planned(run_file, "regenerate.max_tokens=7", given))
    # How many turns a plugin's prompts have is not known.
    check_before(*_planned(run_file, "regenerate.max_tokens=4"))
    assert "conversations of one turn will be dropped" in caplog.text


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (".", "the run's output"),
        ("runs/quickstart-dflash-smoke", "the run's output"),
        ("runs", "the run's output"),
        ("runs/quickstart-dflash-smoke/train", "in train/"),
        ("runs/quickstart-dflash-smoke/regenerate/deep", "in regenerate/"),
        ("thesis", "files that are no cache"),
    ],
)
def test_a_cache_among_other_files(refused: Refused, run_file: Path, path: str, says: str) -> None:
    (run_file.parent / "thesis").mkdir()
    (run_file.parent / "thesis" / "thesis.txt").write_text("years of work")
    refused(f'cache.path="{path}"', says=("the cache cannot be put into this folder", says))
    refused(f'cache.path="{run_file.parent / path}"', says=("the cache cannot be put into this folder", says))
    assert (run_file.parent / "thesis" / "thesis.txt").exists()


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3"])
def test_features_that_the_cache_format_cannot_store(refused: Refused, dtype: str) -> None:
    """Regeneration comes before the cache, and may take days."""
    sets = f"cache.dtype={dtype}", "cache.format=deepspec-v2", "features.mode=cached"
    refused(*sets, 'run.stages=["regenerate", "cache", "train"]', says=("cannot store features", "cache.dtype"))


def test_what_the_run_reads_is_not_discarded(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = finished_copy.parent / "runs" / "quickstart-dflash-smoke" / "regenerate" / "conversations.jsonl"
    given = ["--set", f"data.sources=[{{path={json.dumps(str(answers))}}}]"]
    assert main(["run", str(finished_copy), "--smoke", "--force", "regenerate", *given]) == 2
    assert "--force would discard files that the run reads" in capsys.readouterr().err
    assert answers.exists()
    exchange = answers.parents[1] / "train" / "exchange"
    exchange.mkdir()
    (exchange / "of another run").touch()
    given = ["--set", f"features.exchange={json.dumps(str(exchange))}"]
    assert main(["run", str(finished_copy), "--smoke", "--force", "train", *given]) == 2
    assert "where:    features.exchange" in capsys.readouterr().err
    assert (exchange / "of another run").exists()


def test_results_that_have_no_place(refused: Refused, run_file: Path) -> None:
    out = run_file.parent / "runs" / "quickstart-dflash-smoke"
    (out / "train").mkdir(parents=True)
    (out / "train" / "checkpoints").write_text("a file")
    refused(says=("Results cannot be written to this folder", "checkpoints is no folder"))


def test_little_room_for_checkpoints_is_said(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, steps = _planned(run_file)
    monkeypatch.setattr("deepspec_core.pipeline.checking.free_bytes", lambda _: 10**9)
    check_before(run, steps)
    assert "train.keep_checkpoints" not in caplog.text
    run, steps = _planned(run_file, "train.keep_checkpoints=100000")
    check_before(run, steps)
    assert "100001 checkpoints may take" in caplog.text


def test_a_confidence_threshold_for_a_draft_without_confidence(refused: Refused) -> None:
    refused("evaluate.confidence_threshold=0.5", says=("gives no confidence", "confidence_threshold"))


def test_a_draft_to_evaluate_that_is_not_there(refused: Refused) -> None:
    refused('evaluate.draft="elsewhere/draft"', says=("elsewhere/draft",))


@pytest.mark.parametrize("damage", ["cut", "gone", "of another draft"])
def test_a_draft_to_evaluate_that_is_damaged(refused: Refused, finished: Path, tmp_path: Path, damage: str) -> None:
    draft = Path(shutil.copytree(finished.parent / "runs" / "quickstart-dflash-smoke" / "draft", tmp_path / "d"))
    weights = draft / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    else:
        config = json.loads((draft / "config.json").read_text())
        (draft / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    says = {"cut": "weights cannot be read", "gone": "has no weights", "of another draft": "the weights are not those"}
    refused(f"evaluate.draft={json.dumps(str(draft))}", says=(says[damage], str(weights)))


def test_folders_that_cannot_be_written(refused: Refused, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_file.parent / "taken").write_text("a file")
    refused('run.output="taken/run"', says=("Results cannot be written to this folder", "taken is no folder"))
    refused('cache.path="taken"', says=("Results cannot be written to this folder", "taken is no folder"))
    # Where it is there, /proc takes no file, whoever asks and whatever its permissions say.
    if Path("/proc/self").exists():
        refused(
            'cache.path="/proc/cache"', says=("Results cannot be written to this folder", "/proc cannot be written to")
        )
    monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)
    refused(says=("Results cannot be written to this folder", "cannot be written to"))


def test_a_finished_draft_that_would_land_behind_a_link(refused: Refused, run_file: Path) -> None:
    out = run_file.parent / "runs" / "quickstart-dflash-smoke"
    out.mkdir(parents=True)
    (run_file.parent / "other").mkdir()
    (out / "draft").symlink_to(run_file.parent / "other")
    refused(says=("The finished draft cannot be written to this place", "a symbolic link"))


def test_no_room_for_a_checkpoint(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec_core.pipeline.checking.free_bytes", lambda _: 10_000)
    refused(says=("no room for a checkpoint", "10.0 kB free"))


def test_a_term_or_draft_of_a_plugin_that_fails_is_named(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_self: object, _stats: object) -> None:
        raise AttributeError("no such statistic")

    monkeypatch.setattr("deepspec_core.rows.terms.CrossEntropy.__call__", fails)
    refused(says=("loss term 'ce' fails on made-up rows", "deepspec-core", "no such statistic"))
    monkeypatch.undo()
    monkeypatch.setattr("deepspec_dflash.model.DFlashModel.block_hidden", lambda *_: [][1])
    refused(says=("draft type 'dflash' fails on a made-up sample", "deepspec-dflash", "IndexError"))


@pytest.mark.parametrize("reads", [lambda t: t.sum().item(), lambda t: t.nonzero(), lambda t: t.float().numpy()])
def test_a_draft_that_reads_numbers_is_not_refused(
    reads: Any, run_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from deepspec_dflash.model import DFlashModel

    hidden = DFlashModel.block_hidden

    def reading(self: DFlashModel, batch: Any) -> Any:
        reads(batch.features.hidden)
        return hidden(self, batch)

    monkeypatch.setattr(DFlashModel, "block_hidden", reading)
    run, steps = _planned(run_file)
    check_before(run, steps)
    assert "Traceback" not in capfd.readouterr().err


def test_a_draft_of_wrong_shapes_is_told_in_one_message(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def misshapen(_draft: object, batch: Any) -> torch.Tensor:
        return batch.features.hidden @ torch.ones(3, 3)

    monkeypatch.setattr("deepspec_dflash.model.DFlashModel.block_hidden", misshapen)
    refused(says=("draft type 'dflash' fails on a made-up sample", "deepspec-dflash"))


def test_rows_of_another_form_are_told(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from attrs import evolve

    from deepspec_dflash.model import DFlashModel

    forward = DFlashModel.forward

    def flat(self: DFlashModel, batch: Any) -> Any:
        rows = forward(self, batch)
        return evolve(rows, weight=rows.weight[:, None])

    monkeypatch.setattr(DFlashModel, "forward", flat)
    refused(says=("a draft returns rows that cannot be used: `weight`", "deepspec-dflash", "DFlashModel"))


@pytest.mark.parametrize("quickstart", ["dflash", "dspark", "eagle3"])
def test_what_can_run_is_not_refused(quickstart: str, run_file: Path) -> None:
    text = (Path(__file__).parents[1] / "examples" / "quickstart" / f"{quickstart}.toml").read_text()
    run_file.write_text(text.replace("../../runs/", "runs/"))
    warnings.simplefilter("error")
    for precision in ("float32", "bfloat16"):
        check_before(*_planned(run_file, f'train.precision="{precision}"'))
    assert not (run_file.parent / "runs").exists()


def test_samples_longer_than_the_targets_positions(refused: Refused) -> None:
    says = ("longer than the target's number of positions", "4,096", "1,024", "data.max_length = 1024")
    refused("data.max_length=4096", says=says)


@pytest.mark.parametrize(("token", "says"), [(2, "a stop token"), (1, "a control token of the chat template")])
def test_a_mask_token_that_means_something(refused: Refused, token: int, says: str) -> None:
    refused(f"draft.mask_token_id={token}", says=("mask token occurs in the target's texts", says, "mask_token_id"))
