"""`deepspec report` of training: curves on the page and in a picture, with and without an evaluation."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_report_page import Page

from deepspec_core.cli.main import main
from deepspec_core.reporting.curves import MOST_POINTS, groups, read_training

EVIL = "<script>alert($x_1$)</script>"
TERMS = {"loss/ce": 2.0, "loss/tv": 0.5}
PNG = b"\x89PNG\r\n\x1a\n"


def line(step: int, **more: Any) -> dict[str, Any]:
    rates = {f"{name}@{slot}": 0.5 / (slot + 1) for name in ("accept_rate", "accuracy") for slot in range(11)}
    return {
        "step": step, "epoch": step / 100, "lr": 1e-3 / step, "grad_norm": 9.0 / step, "loss": 3.0, **TERMS, **rates,
        "tau_probabilistic": 1.5, "tau_greedy": 1.25, "tokens_per_second": 9000.0, "sequences_per_second": 9.0,
        "step_seconds": 0.2, "padding_share": 0.3, "peak_memory_bytes": 3_000_000_000, **more,
    }  # fmt: skip


def trained(folder: Path, lines: list[dict[str, Any]], name: str = "tiny") -> Path:
    (folder / "train").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "train" / "metrics.jsonl").write_text(text)
    if not (folder / "config.toml").exists():
        (folder / "config.toml").write_text(f'[run]\nname = "{name}"\n')
    return folder


def page_of(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert max(page.ids.values(), default=1) == 1
    assert page.tags["script"] == 0
    return page


def test_a_run_that_was_only_trained_has_a_page_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path / "run", [line(step) for step in range(1, 60)])
    with (folder / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "loss": 1}\nhalf a line\n{"step": 61, "lo')
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "report.html" in said
    assert "training.png" in said
    page = page_of(folder / "report.html")
    assert page.headings == [
        "Training", "Training: loss", "Training: accepted length", "Training: acceptance by position",
        "Training: optimizer", "Training: speed and memory", "To reproduce",
    ]  # fmt: skip
    assert page.tags["svg"] == 3 + 1 + 2 + 2 + 4
    words = "".join(page.words)
    assert "1 lines of its metrics.jsonl cannot be read" in words
    assert "trained by DeepSpec" in words
    assert "http" not in (folder / "report.html").read_text().replace("http-equiv", "")
    assert (folder / "training.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_folder_of_the_file_is_made_and_what_is_in_the_way_is_one_message(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path / "run", [line(step) for step in range(1, 5)])
    assert main(["report", str(folder), option, str(tmp_path / "new" / "folder" / "file")]) == 0
    assert (tmp_path / "new" / "folder" / "file").is_file()
    for place in (folder, folder / "config.toml" / "file", Path("/proc/file")):
        for asked in (option, "--output"):
            assert main(["report", str(folder), asked, str(place)]) == 2
            said = capsys.readouterr().err
            assert "the report cannot be written there" in said
            assert "Traceback" not in said


def test_held_out_figures_ranks_and_unknown_names_are_drawn_where_they_are(tmp_path: Path) -> None:
    ranks = {"slowest_rank": 1, "slowest_rank_seconds": 0.2, "fastest_rank_seconds": 0.1}
    lines = [line(step, **ranks, new_figure=1.0) for step in range(1, 30)]
    lines[9]["held_out/accepted_length"], lines[19]["held_out/accepted_length"] = 2.5, 2.25
    found = read_training(trained(tmp_path, lines), "tiny")
    assert found is not None
    panels = {panel.title: panel for group in groups([(0, found)]) for panel in group.panels}
    assert [one.name for one in panels["slowest and fastest rank"].series] == [
        "slowest_rank_seconds", "fastest_rank_seconds",
    ]  # fmt: skip
    assert panels["new_figure"].series[0].values == [1.0] * 29
    real = panels["accepted length"].series[2]
    assert (real.kind, real.steps, real.values) == ("points", [10, 20], [2.5, 2.25])
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert "2.50 at step 10" in page_of(tmp_path / "page.html").words


def test_positions_follow_each_other_and_many_points_are_averaged(tmp_path: Path) -> None:
    count = 3 * MOST_POINTS
    found = read_training(trained(tmp_path, [line(step, loss=float(step)) for step in range(1, count + 1)]), "tiny")
    assert found is not None
    panels = {panel.title: panel for group in groups([(0, found)]) for panel in group.panels}
    assert [one.name for one in panels["accepted"].series] == [f"accept_rate@{slot}" for slot in range(11)]
    assert [one.shade for one in panels["accepted"].series] == sorted(
        (one.shade for one in panels["accepted"].series), reverse=True
    )
    (loss,) = panels["loss"].series
    assert len(loss.values) == MOST_POINTS
    assert (loss.steps[0], loss.values[0]) == (2, 2.0)  # of steps 1 to 3
    assert loss.smooth is not None
    assert math.isclose(loss.smooth[200], loss.values[200])


@pytest.mark.slow
def test_an_evaluated_and_trained_run_beside_one_that_was_only_trained(judged_copy: Path, tmp_path: Path) -> None:
    before = page_of(judged_copy / "report.html")
    trained(judged_copy, [line(step) for step in range(1, 5)])
    trained(tmp_path / "other", [line(step, **{EVIL: 1.0}) for step in range(1, 5)], name="other")
    assert main(["report", "other", "run", "--html", "page.html", "--png", "picture.png"]) == 0
    page = page_of(Path("page.html"))
    assert page.headings[:2] == ["Figures", "Training"]
    assert set(before.headings) < set(page.headings)
    assert page.tags["svg"] == before.tags["svg"] + 3 + 1 + 4 + 2 + 4 + 1
    assert EVIL in page.words
    assert Path("picture.png").read_bytes().startswith(PNG)


def test_what_cannot_be_reported_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "There is nothing to report" in capsys.readouterr().err
    trained(tmp_path, [line(1)])
    assert main(["report", str(tmp_path), "--json"]) == 2
    assert "so there is no table" in capsys.readouterr().err
    trained(tmp_path / "other", [line(1)])
    assert main(["report", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "ask for the curves of training with --html or --png" in capsys.readouterr().err
    trained(tmp_path, [{"step": 3}])
    for asked in ([], ["--png", str(tmp_path / "x.png")]):
        assert main(["report", str(tmp_path), *asked]) == 2
        assert "curves in train/metrics.jsonl" in capsys.readouterr().err


def test_without_matplotlib_nobody_asked_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trained(tmp_path, [line(1), line(2)])
    assert main(["report", str(tmp_path)]) == 0
    assert "pip install 'deepspec-core[report]'" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--png", str(tmp_path / "x.png")]) == 2
    assert not (tmp_path / "x.png").exists()
