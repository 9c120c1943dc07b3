"""Coefficients that change over the optimizer's steps: their values, and how run files write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli

from deepspec_core.cli.main import main
from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.config.render import render
from deepspec_core.config.schema import LossOptions
from deepspec_core.errors import ConfigError, DeepSpecError
from deepspec_core.pipeline.fingerprint import flatten
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.rows.coefficient_schedule import CoefficientSchedule

RUN = """
[run]
name = "a"
output = "out"
stages = ["train"]
[target]
model = "m"
layers = [1]
[data]
sources = [{path = "x"}]
[draft]
type = "toy"
"""
SCHEDULED = RUN + "[loss]\nterms = {tv = {start = 0, end = 0.9, steps = 2000}, ce = 0.1}\n"
TV = CoefficientSchedule(start=0.0, end=0.9, steps=2000)


def read(tmp_path: Path, text: str, *overrides: str) -> RunFile:
    (tmp_path / "run.toml").write_text(text)
    return load_run_file(tmp_path / "run.toml", overrides=overrides, plugins=load_plugins())


def problems(tmp_path: Path, *overrides: str) -> dict[str, DeepSpecError]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, RUN, *overrides)
    return {str(problem.where): problem for problem in caught.value.problems}


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.9), (0.9, 0.1), (0.3, 0.3)])
def test_it_goes_from_start_to_end_and_stays_there(shape: str, start: float, end: float) -> None:
    schedule = CoefficientSchedule(start=start, end=end, steps=8, after=3, shape=shape)
    values = [schedule.at(step) for step in range(20)]
    assert values[:4] == [start] * 4
    assert values[11:] == [end] * 9
    assert values[7] == pytest.approx((start + end) / 2)  # halfway
    if start == end:
        assert values == pytest.approx([start] * 20)
    else:
        assert values[3:12] == sorted(set(values), reverse=end < start)


def test_shapes_in_between() -> None:
    linear = CoefficientSchedule(start=1.0, end=3.0, steps=4)
    assert [linear.at(step) for step in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    cosine = CoefficientSchedule(start=1.0, end=3.0, steps=4, shape="cosine")
    assert cosine.at(1) == pytest.approx(2.0 - 2**-0.5)
    assert cosine.at(3) == pytest.approx(2.0 + 2**-0.5)
    assert CoefficientSchedule(start=0.0, end=1.0, steps=1).at(1) == 1.0


def test_a_run_file_writes_numbers_and_tables(tmp_path: Path, toy: Any) -> None:
    file = read(tmp_path, SCHEDULED)
    assert file.loss.terms == {"ce": 0.1, "tv": TV}
    tv = file.loss.terms["tv"]
    assert isinstance(tv, CoefficientSchedule)
    assert type(tv.start) is float
    assert (tv.after, tv.shape) == (0, "linear")
    full = "loss.terms={tv={start=1, end=0, steps=3, after=5, shape='cosine'}}"
    assert read(tmp_path, RUN, full).loss.terms == {
        "tv": CoefficientSchedule(start=1.0, end=0.0, steps=3, after=5, shape="cosine")
    }


def test_overrides_put_either_in_the_others_place(tmp_path: Path, toy: Any) -> None:
    table = "loss.terms.tv={start=0.0,end=0.9,steps=2000}"
    assert read(tmp_path, RUN, table).loss.terms == {"tv": TV}
    assert read(tmp_path, SCHEDULED, "loss.terms.tv=0.5").loss.terms == {"ce": 0.1, "tv": 0.5}
    assert read(tmp_path, SCHEDULED, "loss.terms.ce=0.5", table).loss.terms == {"ce": 0.5, "tv": TV}
    one = read(tmp_path, SCHEDULED, "loss.terms.tv.steps=7").loss.terms["tv"]
    assert one == CoefficientSchedule(start=0.0, end=0.9, steps=7)


@pytest.mark.parametrize(
    ("entry", "key", "found", "expected", "fix"),
    [
        ("start=0, end=1, steps=0", "steps", "0 (a whole number)", "a whole number, >= 1", None),
        ("start=0, end=1, steps=2.0", "steps", "2.0 (a number)", "a whole number", None),
        ("start=0, end=1, steps=2, after=-1", "after", "-1 (a whole number)", "a whole number, >= 0", None),
        ("start='a', end=1, steps=2", "start", '"a" (text)', "a number", None),
        ("start=true, end=1, steps=2", "start", "true (a boolean)", "a number", None),
        ("start=0, end=inf, steps=2", "end", "inf (a number)", "a finite number", None),
        (
            "start=0, end=1, steps=2, shape='cosin'",
            "shape",
            '"cosin" (text)',
            "one of linear, cosine",
            "write 'cosine'",
        ),
        (
            "start=0, end=1, steps=2, stpes=3",
            "stpes",
            "stpes",
            "one of start, end, steps, after, shape",
            "write 'steps'",
        ),
        ("start=0, steps=2", "end", None, "a number", None),
    ],
)
def test_a_mistake_is_told_with_its_path(
    tmp_path: Path, toy: Any, entry: str, key: str, found: str | None, expected: str, fix: str | None
) -> None:
    (problem,) = (told := problems(tmp_path, f"loss.terms={{tv={{{entry}}}}}")).values()
    assert list(told) == [f"loss.terms.tv.{key}"]
    assert (problem.found, problem.expected, problem.fix) == (found, expected, fix)


def test_every_mistake_is_told_at_once(tmp_path: Path, toy: Any) -> None:
    entry = (
        "loss.terms={ce='x', tv={start='a', end=true, steps=0, shap='cosine'}, kl=nan, tvv={start=0, end=1, steps=1}}"
    )
    assert set(problems(tmp_path, entry)) == {
        *("loss.terms.ce", "loss.terms.kl", "loss.terms.tvv"),
        *(f"loss.terms.tv.{key}" for key in ("start", "end", "steps", "shap")),
    }


@pytest.mark.parametrize(("value", "expected"), [("'x'", "a number or a table with the keys start, end, steps"),
                                                  ("true", "a number or a table with the keys start, end, steps"),
                                                  ("[0.1, 0.2]", "a number or a table with the keys start, end, steps"),
                                                  ("nan", "a finite number")])  # fmt: skip
def test_what_is_neither_is_told_what_it_could_be(tmp_path: Path, toy: Any, value: str, expected: str) -> None:
    (problem,) = problems(tmp_path, f"loss.terms.ce={value}").values()
    assert str(problem.expected).startswith(expected)


def test_rendering_round_trips_in_order(tmp_path: Path, toy: Any) -> None:
    file = read(tmp_path, SCHEDULED)
    rendered = render(file)
    again = read(tmp_path, rendered)
    assert again == file
    # Terms are summed in their order, and rounding knows it.
    assert list(again.loss.terms) == list(file.loss.terms)
    assert render(again) == rendered
    assert tomli.loads(rendered)["loss"]["terms"] == {
        "ce": 0.1,
        "tv": {"start": 0.0, "end": 0.9, "steps": 2000, "after": 0, "shape": "linear"},
    }


def test_the_command_shows_it(tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(SCHEDULED)
    assert main(["config", "show", str(tmp_path / "run.toml"), "--set", "loss.terms.tv.after=5"]) == 0
    assert tomli.loads(capsys.readouterr().out)["loss"]["terms"]["tv"]["after"] == 5


def test_a_fingerprint_has_every_key_of_it(tmp_path: Path, toy: Any) -> None:
    flat = flatten(read(tmp_path, SCHEDULED))
    assert {key: flat[key] for key in flat if key.startswith("loss.terms")} == {
        "loss.terms.ce": 0.1,
        "loss.terms.tv.start": 0.0,
        "loss.terms.tv.end": 0.9,
        "loss.terms.tv.steps": 2000,
        "loss.terms.tv.after": 0,
        "loss.terms.tv.shape": "linear",
    }
    assert json.loads(json.dumps(flat)) == flat
    assert flatten(read(tmp_path, render(read(tmp_path, SCHEDULED)))) == flat


def test_numbers_stand_before_schedules_as_toml_writes_them() -> None:
    assert list(LossOptions(terms={"a": TV, "b": 1.0, "c": TV, "d": 2.0}).terms) == ["b", "d", "a", "c"]
