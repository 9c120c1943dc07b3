"""Numbers that no machine or model can mean are refused when the run file is read, not when memory runs out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from deepspec_core.cli.main import main
from deepspec_core.config.bounds import real, whole
from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.errors import ConfigError
from deepspec_core.interface.training import train
from deepspec_core.plugins.discovery import load_plugins


@pytest.mark.parametrize(
    "override",
    [
        "run.threads=5000",
        "train.loader_workers=3000",
        "train.global_batch_size=4000000000",
        "train.max_steps=99999999999",
        "train.lr=inf",
        "train.clip_norm=nan",
        "train.betas=[0.9, 7.0]",
        "train.betas=[0.9, 1.0]",
        "train.betas=[1.0, 0.999]",
        "train.betas=[-0.1, 0.999]",
        "loss.terms.ce=1e300",
        "loss.terms.ce=-1e300",
        "loss.terms.ce=nan",
        "loss.terms.ce={start=inf, end=1.0, steps=3}",
        "loss.terms.ce={start=0.0, end=1e300, steps=3}",
        "loss.weighting={type='decay', gamma=1e-300}",
        "loss.weighting={type='decay', gamma=nan}",
        "loss.weighting={type='decay', gamma=inf}",
        "loss.weighting={type='decay', gamma=1e300}",
        "loss.weighting={type='d-pace', alpha=nan}",
        "draft.num_layers=1000000",
        "draft.block_size=1000000",
        "draft.num_anchors=100000000",
        "draft.mask_token_id=true",
        "draft.layer.head_dim=100000000",
        "data.max_length=1000000000",
        "regenerate.batch_size=100000000",
        "regenerate.temperature=1e-30",
        "evaluate.temperature=[0.0, 1e-38]",
        "evaluate.temperature=[inf]",
        "run.seed=99999999999999999999",
    ],
)
def test_an_absurd_value_is_one_problem(run_file: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_file(run_file, overrides=[override], plugins=load_plugins())
    (problem,) = caught.value.problems
    assert str(problem.where).startswith(override.partition("=")[0])
    assert problem.expected is not None


@pytest.mark.parametrize("path", ["a" * 300, "runs/" + "a" * 300, "a/" * 3000, "a\0b", "\ud800"])
@pytest.mark.parametrize("key", ["run.output", "cache.path"])
def test_a_path_that_no_file_system_takes(
    new_run_file: Callable[[Path], Path], tmp_path: Path, path: str, key: str
) -> None:
    (tmp_path / "run").mkdir()
    file = new_run_file(tmp_path / "run")
    tables = tomli.loads(file.read_text())
    section, name = key.split(".")
    tables.setdefault(section, {})[name] = path
    for call in (
        lambda: train(tables, base=file.parent),
        lambda: train(path),
        lambda: train({}, base=path),
        lambda: RunFile.from_dict(tables, base=str(file.parent)),
    ):
        with pytest.raises(ConfigError, match="no file or folder can have this path"):
            call()
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_for_an_evaluation_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--draft", "d", "--target", "t", "--task", "gsm8k", "--out", "a" * 300]
    assert main(["evaluate", *arguments]) == 2
    assert "no file or folder can have this path" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["dspark", "eagle3"])
def test_options_of_plugins_have_bounds_too(recipe: str, run_file: Path) -> None:
    text = (Path(__file__).parents[1] / "examples" / "quickstart" / f"{recipe}.toml").read_text()
    run_file.write_text(text)
    key = {"dspark": "draft.markov.rank=1000000000", "eagle3": "draft.ttt_length=1000000000"}[recipe]
    with pytest.raises(ConfigError, match=key.partition("=")[0].replace(".", r"\.")):
        load_run_file(run_file, overrides=[key], plugins=load_plugins())


def test_a_temperature_that_logits_cannot_be_divided_by_is_told_the_nearest(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(run_file), "--smoke", "--set", "evaluate.temperature=[1e-7]"]) == 2
    seen = capsys.readouterr().err
    assert "0 for greedy decoding, or at least 1e-06" in seen
    assert "Traceback" not in seen


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 4])
def test_whole_numbers(value: object) -> None:
    from attrs import field, make_class

    kind = make_class("Options", {"size": field(validator=whole(1, 3))})
    with pytest.raises((TypeError, ValueError), match="'size' must be"):
        kind(value)
    assert kind(3).size == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", -0.1, 1.1])
def test_finite_numbers(value: object) -> None:
    from attrs import field, make_class

    kind = make_class("Options", {"share": field(validator=real(0, 1))})
    with pytest.raises((TypeError, ValueError), match="'share' must be"):
        kind(value)
    assert kind(1).share == 1
