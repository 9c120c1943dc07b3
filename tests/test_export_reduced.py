"""`deepspec export --draft-vocab N` and `--untrained RUN.toml`: drafts that are made for the export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepspec_core.cli.main import main

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"


def test_a_vocabulary_is_reduced_by_what_the_runs_answers_have(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_copy.parent)
    folder = Path("runs/quickstart-dflash-smoke")
    command = ["export", str(folder), "--to", "deepspec", "--draft-vocab", "150", "--prompts", "2", "--out", "small"]
    assert main(command) == 0
    seen = capsys.readouterr().out
    assert "on 2 prompts" in seen
    whole, small = (load_file(place / "model.safetensors") for place in (folder / "draft", Path("small")))
    ids = small["draft_ids"]
    assert len(ids) == 150
    assert bool((ids[1:] > ids[:-1]).all())
    assert torch.equal(small["lm_head.weight"], whole["lm_head.weight"][ids])
    assert all(torch.equal(small[name], whole[name]) for name in whole if name != "lm_head.weight")
    about = json.loads(Path("small/export.json").read_text())["draft_vocabulary"]
    assert (about["tokens"], about["of"]) == (150, len(whole["lm_head.weight"]))
    assert 0.9 < about["covered"] <= 1
    measured = about["measured"]
    assert measured["prompts"] == 2
    # Fewer tokens can only take proposals away where they are not among them.
    assert 1 <= measured["accepted_length_after"] <= measured["accepted_length_before"] + 0.5
    card = Path("small/README.md").read_text()
    assert f"reduced to 150 of {about['of']:,} tokens" in card
    assert main(["checkpoint", "show", "small"]) == 0
    assert "vocab_size = 150" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--to", "vllm", "--draft-vocab", "150"), "reduced vocabulary"),
        (("--to", "deepspec", "--draft-vocab", "99999999"), "--draft-vocab"),
        (("--to", "deepspec", "--draft-vocab", "99999999999999999999"), "--draft-vocab"),
        (("--to", "deepspec", "--draft-vocab", "2"), "more than the 2 stop tokens of the target"),
        (("--to", "deepspec", "--draft-vocab", "1024"), "nothing would be reduced"),
    ],
)
def test_what_cannot_be_reduced_is_refused_before_the_target_is_loaded(
    finished_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: tuple[str, ...],
    says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(finished_copy.parent)
    monkeypatch.setattr("deepspec_core.targets.opening.load_target", None)
    assert main(["export", "runs/quickstart-dflash-smoke", *more, "--out", "small"]) == 2
    assert says in capsys.readouterr().err
    assert not Path("small").exists()


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither draft is decoded with: the target is not loaded."""
    known = dict.fromkeys(("acceptance_length", "samples"), 1) | {"acceptance_length_interval": [1, 1]}
    monkeypatch.setattr("deepspec_core.pipeline.reduced_vocabulary._accepted", lambda *_: known)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("more", [(), ("--draft-vocab", "150")])
def test_a_run_file_in_another_folder_than_the_results_is_taken(
    finished_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    saved = finished_copy.parent / "runs" / "quickstart-dflash-smoke" / "config.toml"
    saved.write_text(saved.read_text().replace('output = "runs/', 'output = "../runs/'))
    run_file = finished_copy.parent / "files" / "mine.toml"
    run_file.parent.mkdir()
    run_file.write_text(saved.read_text())
    out = tmp_path / "out"
    assert main(["export", str(run_file), "--to", "deepspec", *more, "--out", str(out)]) == 0, capsys.readouterr().err
    assert (out / "model.safetensors").is_file()


def tokens_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "tokens").glob("*.*")}


@pytest.mark.usefixtures("unmeasured")
def test_answers_that_are_gone_or_edited_are_refused_and_the_run_stays_as_it_is(
    finished_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    command = ["export", str(folder), "--to", "deepspec", "--draft-vocab", "150", "--out", str(tmp_path / "out")]
    answers, before = folder / "regenerate" / "conversations.jsonl", tokens_of(folder)
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[1:]))
    assert main(command) == 2
    assert "changed after the stage" in capsys.readouterr().err
    shutil.move(folder / "regenerate", tmp_path / "moved")
    assert main(command) == 2
    assert "the run's answers are missing" in capsys.readouterr().err
    assert tokens_of(folder) == before


@pytest.mark.usefixtures("unmeasured")
def test_tokens_that_are_gone_are_made_apart(
    finished_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    command = ["export", str(folder), "--to", "deepspec", "--draft-vocab", "150", "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    shutil.rmtree(folder / "tokens")
    assert main([*command, str(tmp_path / "other")]) == 0, capsys.readouterr().err
    one, other = (load_file(tmp_path / name / "model.safetensors")["draft_ids"] for name in ("one", "other"))
    assert torch.equal(one, other)
    assert not (folder / "tokens").exists()


def test_a_checkpoint_without_a_run_has_no_answers(
    drafts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(drafts["eagle3"]), "--to", "deepspec", "--draft-vocab", "9", "--out", out]) == 2
    assert "the folder of a run" in capsys.readouterr().err


# The formats speculators and deepspec hold the target's embedding and head, which this target has in one memory.
@pytest.mark.parametrize(
    ("kind", "form"), [("dspark", "vllm"), ("eagle3", "vllm"), ("eagle3", "speculators"), ("dflash", "deepspec")]
)
def test_a_run_file_gives_something_to_load_before_there_is_a_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, form: str
) -> None:
    path = tmp_path / f"{kind}.toml"
    path.write_text((QUICKSTART / f"{kind}.toml").read_text())
    out = tmp_path / "out"
    assert main(["export", "--untrained", str(path), "--to", form, "--out", str(out)]) == 0
    assert "random" in capsys.readouterr().err
    record = json.loads((out / "export.json").read_text())
    assert record["untrained"] is True
    if form != "deepspec":
        assert record["verified"]["replay"]["log_probabilities_differ_by"] < 1e-4
    assert "this draft was not trained" in (out / "README.md").read_text()
    assert [one.name for one in tmp_path.iterdir() if one.name not in (path.name, "out")] == []


def test_what_does_not_go_together_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--to", "vllm"]) == 2
    assert "--untrained" in capsys.readouterr().err
    path = tmp_path / "eagle3.toml"
    path.write_text((QUICKSTART / "eagle3.toml").read_text())
    assert main(["export", "--to", "sglang", "--untrained", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "qk_norm = false" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("init", "fix"),
    [("drafts/mine", "deepspec export {base}/drafts/mine --to vllm"), ("target:last", "Remove draft.init")],
)
def test_a_draft_that_would_not_begin_with_random_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], init: str, fix: str
) -> None:
    (tmp_path / "drafts" / "mine").mkdir(parents=True)
    path = tmp_path / "dspark.toml"
    text = (QUICKSTART / "dspark.toml").read_text()
    path.write_text(text.replace("[draft]\n", f'[draft]\ninit = "{init}"\n'))
    assert main(["export", "--untrained", str(path), "--to", "vllm", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "draft.init" in said
    assert fix.format(base=tmp_path) in said
    assert not (tmp_path / "out").exists()
