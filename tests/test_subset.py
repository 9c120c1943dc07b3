"""cache.subset: pilots on a part of the corpus. The same part from the run's own cache and from another run's."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.contracts.draft import Sample
from deepspec_core.data.samples import HeldSamples
from deepspec_core.data.subset import SamplesOfPart, part_of
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import load_plugins

IDS = [f"row {number}" for number in range(2000)]


def _taken(ids: list[str], subset: int | float) -> set[str]:
    return {ids[number] for number in part_of(ids, subset)}


def test_a_smaller_part_is_in_every_larger_one_whatever_the_order() -> None:
    sizes: list[int | float] = [1, 0.01, 100, 0.1, 400, 0.5, 1500]
    parts = [_taken(IDS, size) for size in sizes]
    for smaller, larger in pairwise(parts):
        assert smaller < larger
    for size, part in zip(sizes, parts, strict=True):
        assert _taken(IDS[::-1], size) == part
        # Five standard deviations of so many draws; numbers are exact.
        assert abs(len(part) - (size if isinstance(size, int) else size * len(IDS))) < 5 * len(IDS) ** 0.5 / 2
    assert [len(parts[0]), len(parts[2]), len(parts[4])] == [1, 100, 400]
    # Another corpus with some of the same samples: a share takes the same ones of these.
    assert _taken(IDS[500:], 0.5) == parts[5] & set(IDS[500:])
    assert _taken(IDS, 5000) == set(IDS)
    assert len(part_of([], 0.5)) == len(part_of([], 3)) == 0


def _run(path: Path, *changes: str) -> Run:
    plugins = load_plugins()
    file = load_run_file(path, overrides=[*_SMALL, *changes], plugins=plugins)
    return Run(file=file, path=path, plugins=plugins)


_SMALL = [
    'data.sources=[{path = "rows.jsonl"}]',
    "data.held_out=0.0",
    "data.min_supervised_tokens=1",
    'run.stages=["cache", "train"]',
    "train.max_steps=1",
    "train.global_batch_size=2",
    "draft.num_layers=1",
    "draft.num_anchors=2",
    "run.threads=1",
    "cache.shard_samples=2",
]


@pytest.fixture
def rows(run_file: Path) -> Path:
    """A run file beside rows."""
    said = [
        [{"role": "user", "content": f"Ask {n}"}, {"role": "assistant", "content": "Well, a few words. " * (1 + n % 3)}]
        for n in range(24)
    ]
    lines = (json.dumps({"id": f"row {number}", "messages": messages}) + "\n" for number, messages in enumerate(said))
    (run_file.parent / "rows.jsonl").write_text("".join(lines))
    return run_file


def test_part_of_samples_is_those_samples() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 24).tolist()
    tokens = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    whole = HeldSamples(
        Sample(id=name, input_ids=ids, loss_mask=ids == 0, original_length=len(ids))
        for name, ids in zip(IDS, tokens, strict=False)
    )
    numbers = part_of(whole.ids(), 9)
    part = SamplesOfPart(whole, numbers)
    ids = list(part.ids())
    assert ids == [whole[int(number)].id for number in numbers] == [sample.id for sample in part]
    assert part.lengths().tolist() == [len(sample.input_ids) for sample in part]
    assert [ids[number] for number in part.by_id()] == sorted(ids)
    assert np.all(np.diff(part.lengths()[part.longest_first()]) <= 0)


def _do(path: Path, *changes: str) -> int:
    return main(["run", str(path), *(part for change in [*_SMALL, *changes] for part in ("--set", change))])


def _summary(folder: Path, stage: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / stage / "stage.json").read_text())["summary"]
    return summary


def _output(name: str) -> str:
    return f'run.output="{name}"'


def test_a_cache_has_its_part_and_another_run_reads_the_same_part(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rows.parent
    assert _do(rows, _output("own"), "cache.subset=6") == 0
    expected = _taken([f"row {number}" for number in range(24)], 6)
    own = HDF5Format().open(folder / "own" / "cache", None)
    assert set(own.ids()) == expected
    assert own.header.subset == "6"
    summary = _summary(folder / "own", "cache")
    assert (summary["samples"], summary["not_in_subset"]) == (6, 18)
    assert _summary(folder / "own", "train")["samples"] == 6

    assert _do(rows, _output("own"), "cache.subset=7") == 2
    assert "`cache.subset` changed after the stage `cache`" in capsys.readouterr().err

    assert _do(rows, _output("whole"), 'run.stages=["cache"]') == 0
    reading = ['run.stages=["train"]', 'cache.path="whole/cache"']
    assert _do(rows, _output("pilot"), *reading, "cache.subset=6") == 0
    summary = _summary(folder / "pilot", "train")
    assert (summary["samples"], summary["not_in_subset"]) == (6, 18)
    assert set(_run(rows, _output("pilot"), *reading, "cache.subset=6").cache.open().ids()) == expected
    capsys.readouterr()
    assert _do(rows, _output("pilot"), *reading, "cache.subset=0.5") == 2
    assert "`cache.subset` changed after the stage `train`" in capsys.readouterr().err

    # A part of a part; and what is no part of it at all is said before the first stage.
    reading[1] = 'cache.path="own/cache"'
    assert set(_run(rows, _output("less"), *reading, "cache.subset=2").cache.open().ids()) < expected
    assert _do(rows, _output("none"), *reading, "cache.subset=1e-9") == 2
    assert "1e-09 of 6 samples" in capsys.readouterr().err
    assert not (folder / "none" / "train").exists()


def test_a_cache_of_another_part_is_not_gone_on_with(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _do(rows, _output("one"), 'run.stages=["cache"]', "cache.subset=2", 'cache.path="shared"') == 0
    (rows.parent / "shared" / "stage.json").unlink()
    assert _do(rows, _output("two"), 'run.stages=["cache"]', 'cache.path="shared"') == 2
    assert "made for another subset" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "says"), [
    ("0", "a share between 0 and 1, or a number of samples"),
    ("-3", "a share between 0 and 1"),
    ("1.0", "a share between 0 and 1, or a number of samples"),
    ("1.5", "a share between 0 and 1"),
    ("nan", "cache.subset"),
    ("true", "cache.subset"),
    ('"a tenth"', "cache.subset"),
])  # fmt: skip
def test_what_is_no_part_is_refused_with_the_run_file(
    run_file: Path, capsys: pytest.CaptureFixture[str], value: str, says: str
) -> None:
    assert main(["config", "check", str(run_file), "--set", f"cache.subset={value}"]) == 2
    assert says in capsys.readouterr().err


def test_a_part_of_no_cache_is_refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    online = ["--set", 'features.mode="online"', "--set", 'run.stages=["train"]', "--set", "cache.subset=0.1"]
    assert main(["config", "check", str(run_file), *online]) == 2
    assert "because no cache is read" in capsys.readouterr().err


def test_sizes_follow_the_part(rows: Path) -> None:
    limit = 'data.sources=[{path = "rows.jsonl", limit = 20}]'
    found = [_run(rows, change, *more).cache.expected_samples() for change, more in (
        (limit, []), (limit, ["cache.subset=0.26"]), (limit, ["cache.subset=4"]), (limit, ["cache.subset=40"]),
        ("run.seed=1", []), ("run.seed=1", ["cache.subset=0.5"]), ("run.seed=1", ["cache.subset=4"]),
    )]  # fmt: skip
    assert found == [20, 6, 4, 20, None, None, 4]
