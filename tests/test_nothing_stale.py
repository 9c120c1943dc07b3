"""Results are used again only where everything they were made from is the same: keys, data, draft, prompts."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest

from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.config.schema import HeldOutOptions, changes_results
from deepspec_core.errors import StageError
from deepspec_core.evaluation.evaluator import evaluate
from deepspec_core.journal import Journal
from deepspec_core.pipeline.fingerprint import fingerprint, flatten
from deepspec_core.pipeline.reads import Reads, recording, remembered
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.stages import discard
from deepspec_core.plugins.discovery import load_plugins
from deepspec_targets import dialogues

ONE_THREAD = ("--set", "run.threads=1")


def _folder(path: Path) -> Path:
    return path.parent / "runs" / "quickstart-dflash-smoke"


def _rows(path: Path, count: int = 16, text: str = "the") -> None:
    rows = [
        {"id": str(number), "messages": [{"role": "user", "content": f"{text} {number}"}]} for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_commands_made_of_a_draft_goes_with_it(run_file: Path) -> None:
    """A calibration of before would be served beside the draft that is trained anew."""
    plugins = load_plugins()
    run = Run(file=load_run_file(run_file, plugins=plugins), path=run_file, plugins=plugins)
    of_draft = {"calibration.json", "calibration.sglang.json", "diagnosis.json"}
    of_rounds = {"metrics.json", "simulation.json", "simulation.svg"}

    def left(force: str) -> set[str]:
        compared = "compare/comparison.json", "compare/comparison.md", "compare/comparison.html"
        for name in (
            *of_draft,
            *of_rounds,
            *compared,
            "compare/lookup/metrics.json",
            "train/stage.json",
            "evaluate/stage.json",
        ):
            (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (run.folder / name).write_text("{}")
        discard(run, [force])
        assert [path.name for path in (run.folder / "compare").iterdir()] == ["lookup"], "baselines stay"
        return {path.name for path in run.folder.iterdir()} & (of_draft | of_rounds)

    assert left("evaluate") == of_draft, "the calibration may be what it is evaluated with"
    assert left("train") == set()


def test_every_key_that_changes_results_is_noted_when_it_is_read(run_file: Path) -> None:
    file = load_run_file(run_file, plugins=load_plugins())
    reads = Reads()
    noting = recording(file, reads)
    for section in attrs.fields(type(file)):
        plain, noted = getattr(file, section.name), getattr(noting, section.name)
        if not attrs.has(type(plain)):
            continue
        for attribute in attrs.fields(type(plain)):
            with reads.traced() as trace:
                assert getattr(noted, attribute.name) == getattr(plain, attribute.name)
            own = section.name if attribute.name == "options" else f"{section.name}.{attribute.name}"
            assert trace.keys == ({own} if changes_results(attribute) else set()), attribute.name


def test_when_to_warn_of_a_fall_is_no_setting_of_the_results(run_file: Path) -> None:
    def keys(**changes: int) -> dict[str, object]:
        changed = attrs.evolve(file, train=attrs.evolve(file.train, evaluation=HeldOutOptions(**changes)))
        return fingerprint(flatten(changed), ["train.evaluation"])

    file = load_run_file(run_file, plugins=load_plugins())
    assert keys() == keys(warn_after=9)
    assert keys() != keys(stop_after=9)


def test_what_is_made_once_counts_as_read_by_everyone_who_uses_it() -> None:
    class Made:
        reads = Reads()
        computed = 0

        @remembered
        def part(self) -> int:
            self.reads.key("a.b")
            Made.computed += 1
            return 1

    made = Made()
    assert made.part == 1  # outside any stage
    with made.reads.traced() as trace:
        assert made.part == 1
    assert trace.keys == {"a.b"}
    assert Made.computed == 1


@pytest.mark.slow
def test_an_evaluation_alone_reads_keys_of_other_sections(
    finished: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = _folder(finished) / "draft"
    command = ["run", str(run_file), "--smoke", *ONE_THREAD, "--set", 'run.stages=["evaluate"]']
    command += ["--set", f"evaluate.draft={json.dumps(str(draft))}", "--set", "evaluate.temperature=[0.0]"]
    assert main(command) == 0
    for key, value in (("regenerate.thinking", "true"), ("run.seed", "7"), ("data.held_out", "0.4")):
        assert main([*command, "--set", f"{key}={value}"]) == 2
        assert f"`{key}` changed after the stage `evaluate`" in capsys.readouterr().err


@pytest.mark.parametrize("interrupted", [True, False])
def test_edited_sources_are_refused(run_file: Path, capsys: pytest.CaptureFixture[str], interrupted: bool) -> None:
    rows = run_file.parent / "rows.jsonl"
    _rows(rows)
    command = ["run", str(run_file), "--smoke", *ONE_THREAD, "--stages", "regenerate"]
    command += ["--set", 'data.sources=[{path="rows.jsonl"}]', "--set", 'run.stages=["regenerate"]']
    command += ["--set", "regenerate.max_tokens=4"]
    assert main(command) == 0
    if interrupted:
        record = _folder(run_file) / "regenerate" / "stage.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    _rows(rows, text="a")
    assert main(command) == 2
    assert "The content of data.sources[0] changed after the stage `regenerate`" in capsys.readouterr().err
    _rows(rows)
    assert main(command) == 0


def test_other_prompts_of_a_plugin_under_the_same_version_are_refused(
    finished_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, command = dialogues.prompts, ["run", str(finished_copy), "--smoke", *ONE_THREAD]
    assert main(command) == 0
    monkeypatch.setattr(dialogues, "prompts", lambda split, seed: prompts(split, seed=seed + 1))
    assert main(command) == 2
    assert "The content of data.sources[0] changed after the stage `regenerate` had results" in capsys.readouterr().err


def test_a_dataset_of_the_hub_that_moved_on_is_refused(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commit counts. What the Hub gives is made up here: a builder that knows its commit, and rows."""
    import datasets

    rows = datasets.Dataset.from_list(
        [{"id": str(n), "messages": [{"role": "user", "content": f"Say {n}"}]} for n in range(40)]
    )
    commit = ["1111111"]
    monkeypatch.setattr("deepspec_core.data.source_rows.why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash=commit[0]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    command = ["run", str(run_file), "--smoke", *ONE_THREAD, "--set", 'run.stages=["regenerate"]']
    command += ["--set", 'data.sources=[{path="organisation/prompts"}]', "--set", "regenerate.max_tokens=4"]
    assert main(command) == 0
    record = _folder(run_file) / "regenerate" / "stage.json"
    assert json.loads(record.read_text())["content"]["the content of data.sources[0]"] == "1111111"
    record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    commit[0] = "2222222"
    assert main(command) == 2
    assert "The content of data.sources[0] changed after the stage `" in capsys.readouterr().err


def test_answers_do_not_depend_on_the_taps(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((_folder(finished_copy) / "regenerate" / "stage.json").read_text())
    assert "target.layers" not in record["reads"]
    taps = ["--set", "target.layers=[2, 4]", "--set", 'run.stages=["regenerate"]']
    assert main(["run", str(finished_copy), "--smoke", *ONE_THREAD, *taps]) == 0
    assert "regenerate: already complete" in "".join(capsys.readouterr())


def test_edited_answers_are_refused(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _folder(finished_copy) / "regenerate" / "conversations.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert main(["run", str(finished_copy), "--smoke"]) == 2
    assert "The file of regenerated conversations changed" in capsys.readouterr().err


@pytest.mark.parametrize("says_what_it_knew", [True, False])
def test_a_key_that_came_with_a_later_version_is_refused(
    finished_copy: Path, capsys: pytest.CaptureFixture[str], says_what_it_knew: bool
) -> None:
    """Results that were made before run files had `evaluate.top_p` do not follow it."""
    path = _folder(finished_copy) / "evaluate" / "stage.json"
    record = json.loads(path.read_text())
    known = [key for key in record["known"] if key != "evaluate.top_p"]
    assert len(known) == len(record["known"]) - 1
    record |= {"known": known if says_what_it_knew else []}
    del record["keys"]["evaluate.top_p"]
    record["reads"].remove("evaluate.top_p")
    path.write_text(json.dumps(record))
    command = ["run", str(finished_copy), "--smoke", *ONE_THREAD]
    assert main(command) == 0
    assert main([*command, "--set", "evaluate.top_p=0.3"]) == 2
    told = capsys.readouterr().err
    assert "`evaluate.top_p` changed after the stage `evaluate`" in told
    assert "evaluate.top_p = 1.0, with which the results were made" in told


def test_a_stage_left_out_later_is_refused(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(finished_copy), "--smoke", "--set", 'run.stages=["cache", "train"]']) == 2
    assert "`run.stages.regenerate` changed after the stage `cache`" in capsys.readouterr().err


def test_a_journal_of_other_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "task-t0.jsonl"
    journal = Journal(path)
    journal.append({"prompts": "one"})
    journal.close()
    with pytest.raises(StageError, match="prompts are not those"):
        evaluate([], SimpleNamespace(batch_size=1), journal=path, prompts_digest="another", what="x")  # type: ignore[arg-type]


def test_one_cache_is_not_written_by_two_runs(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cache lies outside the run's own folder, where another run may name it too."""
    shared = finished_copy.parent / "shared-cache"
    script = (
        "import sys; from pathlib import Path; from deepspec_core.locks import lock; "
        "held = lock(Path(sys.argv[1]), problem='', fix=''); print('held', flush=True); sys.stdin.read()"
    )
    command = [
        "run",
        str(finished_copy),
        "--smoke",
        "--stages",
        "cache",
        "--set",
        f"cache.path={json.dumps(str(shared))}",
    ]
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(shared)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert main(command) == 2
        assert "Another process is using this cache" in capsys.readouterr().err
        assert not (shared / "stage.json").exists()
    finally:
        holder.communicate()
    assert main(command) == 0
